"""Measurements of ourselves beside a peer that does the same work, or beside limits."""
