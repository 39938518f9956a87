"""Metrics: each a pure function plus `update`/`compute`, a `name` and `higher_is_better`."""

from .clip_score import CLIPScore, clip_score
from .frechet import FrechetDistance, Moments, frechet_distance
from .kernel import CMMD, KID, KernelDistance, cmmd, kernel_inception_distance
from .lpips import LPIPS, LPIPSMetric
from .pixel import PSNR, SSIM, psnr, ssim
from .precision_recall import PrecisionRecall, PrecisionRecallMetric, precision_recall

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
