"""A grid of SAEs trained on the same activations, and one record for each."""
