"""What SAELens' documentation promises, held with this package registered and without it.

The tests name SAELens alone. `conftest.py` imports this package, and runs them once more in a
process that never does; what both compute is compared: configs, weights, logits, files.
"""
