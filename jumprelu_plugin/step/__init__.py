"""The math of a training step: `dense.py` defines it, `sparse.py` computes the same numbers."""
