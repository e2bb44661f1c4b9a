"""Turning models into text and label scores."""
