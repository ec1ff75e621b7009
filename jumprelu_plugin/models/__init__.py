"""Language models, their hook points, and text for them; the embedded Gemma 2 among the models."""
