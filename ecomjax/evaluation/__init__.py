"""From a model and a task to predictions, scores and the records behind them."""
