"""Lightning callbacks: metrics after each epoch, image grid, table of prompts, checkpoints, rank checks."""

from callbacks.evaluation import EpochEvaluation
from callbacks.image_grid import ImageGrid
from callbacks.progress import SaveBeforeScoring, progress_checkpoints
from callbacks.prompt_table import PromptTable
from callbacks.ranks import RanksAgree

__all__ = [
    "EpochEvaluation",
    "ImageGrid",
    "PromptTable",
    "RanksAgree",
    "SaveBeforeScoring",
    "progress_checkpoints",
]
