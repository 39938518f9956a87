"""Metrics: each a pure function plus `update`/`compute`, a `name` and `higher_is_better`."""

from accel.evaluation.metrics.clip_score import CLIPScore, clip_score
from accel.evaluation.metrics.frechet import FrechetDistance, Moments, frechet_distance
from accel.evaluation.metrics.kernel import CMMD, KID, KernelDistance, cmmd, kernel_inception_distance
from accel.evaluation.metrics.lpips import LPIPS, LPIPSMetric
from accel.evaluation.metrics.pixel import PSNR, SSIM, psnr, ssim
from accel.evaluation.metrics.precision_recall import (
    PrecisionRecall,
    PrecisionRecallMetric,
    precision_recall,
)

__all__ = [
    "CMMD",
    "KID",
    "LPIPS",
    "PSNR",
    "SSIM",
    "CLIPScore",
    "FrechetDistance",
    "KernelDistance",
    "LPIPSMetric",
    "Moments",
    "PrecisionRecall",
    "PrecisionRecallMetric",
    "clip_score",
    "cmmd",
    "frechet_distance",
    "kernel_inception_distance",
    "precision_recall",
    "psnr",
    "ssim",
]
