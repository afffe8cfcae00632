"""Lightning callbacks: progress, metrics per epoch, image grid, prompt table, checkpoints, rank checks."""

from trce_lightning.callbacks.evaluation import EpochEvaluation
from trce_lightning.callbacks.image_grid import ImageGrid
from trce_lightning.callbacks.progress import SaveBeforeScoring, TrainingBar, progress_checkpoints
from trce_lightning.callbacks.prompt_table import PromptTable
from trce_lightning.callbacks.ranks import RanksAgree

__all__ = [
    "EpochEvaluation",
    "ImageGrid",
    "PromptTable",
    "RanksAgree",
    "SaveBeforeScoring",
    "TrainingBar",
    "progress_checkpoints",
]
