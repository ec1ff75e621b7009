"""The JumpReLU training step: `dense.py` defines it, `sparse.py` computes the same numbers."""
