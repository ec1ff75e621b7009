"""What SAELens' documentation promises, held with this package registered and without it.

The tests name SAELens alone. `conftest.py` imports this package unless `WITHOUT` is set in the
environment; `test_without_the_plugin.py` runs all of them once more in a process where it never is
imported, and compares what both computed: configs, weights, activations, logits, files.
"""
