"""Rows from a folder, the Hub or the synthetic shop, and the way from rows to batches."""
