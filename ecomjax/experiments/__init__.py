"""Whole experiments: config in, run folder out."""
