"""Many layers at once: a transcoder for each, or one whose latents write to all later layers."""
