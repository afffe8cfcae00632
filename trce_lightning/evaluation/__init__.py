"""Score a model: scores with the detections behind them, comparisons, and conditions of use."""
