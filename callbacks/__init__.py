"""Lightning callbacks: metrics after each epoch, image grid, export."""

from callbacks.evaluation import EpochEvaluation
from callbacks.image_grid import ImageGrid

__all__ = ["EpochEvaluation", "ImageGrid"]
