"""The JumpReLU training step: `reference.py` defines it, `sparse.py` computes the same numbers."""
