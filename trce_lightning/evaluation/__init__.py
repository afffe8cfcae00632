"""Scoring a model: scores with what is behind them, comparisons, and conditions of use."""
