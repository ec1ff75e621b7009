"""The automated study: a language model explains latents, and predictions from it are scored."""
