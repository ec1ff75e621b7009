"""What latents respond to and what they do: top activations, logit effects, steering, dashboard."""
