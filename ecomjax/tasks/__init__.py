"""Tasks: what a row asks, how the answer is written and read, and how it is scored."""
