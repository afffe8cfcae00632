"""The embedded model: its subjects, prompts, judge and weights, which its domain hands to a run."""
