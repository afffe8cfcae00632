"""Lightning callbacks: metrics after each epoch, image grid, table of prompts."""

from callbacks.evaluation import EpochEvaluation
from callbacks.image_grid import ImageGrid
from callbacks.prompt_table import PromptTable

__all__ = ["EpochEvaluation", "ImageGrid", "PromptTable"]
