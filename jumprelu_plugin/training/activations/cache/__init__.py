"""Activations on disk: written once for several hooks, read by any number of trainings."""
