"""Measure attack success rate, FID and CLIP score, with the detectors that they need."""

from trce_lightning.metrics.asr import AttackSuccessRate, paired_test
from trce_lightning.metrics.detectors import ClipZeroShotDetector, Detector, load_detector
from trce_lightning.metrics.fidelity import (
    Clip,
    feature_fid,
    inception_fid,
    load_clip,
    load_real_statistics,
    save_real_statistics,
)
from trce_lightning.metrics.scores import Evaluator

__all__ = [
    "AttackSuccessRate",
    "Clip",
    "ClipZeroShotDetector",
    "Detector",
    "Evaluator",
    "feature_fid",
    "inception_fid",
    "load_clip",
    "load_detector",
    "load_real_statistics",
    "paired_test",
    "save_real_statistics",
]
