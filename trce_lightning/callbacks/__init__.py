"""Lightning callbacks: metrics after each epoch, image grid, table of prompts, checkpoints, rank checks."""

from trce_lightning.callbacks.evaluation import EpochEvaluation
from trce_lightning.callbacks.image_grid import ImageGrid
from trce_lightning.callbacks.progress import SaveBeforeScoring, progress_checkpoints
from trce_lightning.callbacks.prompt_table import PromptTable
from trce_lightning.callbacks.ranks import RanksAgree

__all__ = [
    "EpochEvaluation",
    "ImageGrid",
    "PromptTable",
    "RanksAgree",
    "SaveBeforeScoring",
    "progress_checkpoints",
]
