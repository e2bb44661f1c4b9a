"""Adapters as pure transforms over parameter dicts; they know paths and shapes, no models."""
