"""Start from a trained SAE: train it further, or refit it to other L0s."""
