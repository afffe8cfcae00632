"""The embedded model: its subjects, captions, judge and weights."""
