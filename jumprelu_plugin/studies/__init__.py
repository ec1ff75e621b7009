"""Whole experiments in one call, with their records."""
