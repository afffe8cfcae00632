"""Lightning callbacks: progress, metrics per epoch, image grid, prompt table, checkpoints, rank checks."""

from trce_lightning.callbacks.evaluation import EpochEvaluation
from trce_lightning.callbacks.image_grid import ImageGrid
from trce_lightning.callbacks.progress import ProgressBars, SaveBeforeScoring, progress_checkpoints
from trce_lightning.callbacks.prompt_table import PromptTable
from trce_lightning.callbacks.ranks import RanksAgree

__all__ = [
    "EpochEvaluation",
    "ImageGrid",
    "ProgressBars",
    "PromptTable",
    "RanksAgree",
    "SaveBeforeScoring",
    "progress_checkpoints",
]
