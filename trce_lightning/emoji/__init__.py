"""The embedded model: its subjects, prompts, judge and weights. Its domain gives them to a run."""
