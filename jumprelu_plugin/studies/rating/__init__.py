"""The blind manual study: raters judge latents without knowing which SAE they come from."""
