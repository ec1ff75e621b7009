"""What both interpretability studies begin with: SAEs, some of their latents, and text."""
