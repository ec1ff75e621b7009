"""Circuits through transcoders: circuit-tracer on a local model, and checks of its graphs."""
