"""What a training reads: mixed activations of one hook, or of pairs of hooks, and their scales."""
