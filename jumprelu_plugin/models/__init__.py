"""Language models, their hook points and text; a small Gemma 2 is included."""
