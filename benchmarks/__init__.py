"""What the package costs, measured beside what it replaces. `python -m benchmarks.speed --help`."""
