"""What a latent responds to: examples of it in text, and what its direction says in the logits."""
