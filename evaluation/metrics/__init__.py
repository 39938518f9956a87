"""Metrics, each a pure function of images or features; FID streams its moments."""

from .clip_score import clip_score
from .frechet import FrechetDistance, Moments, frechet_distance
from .kernel import KernelDistance, cmmd, kernel_inception_distance
from .lpips import LPIPS
from .pixel import psnr, ssim
from .precision_recall import PrecisionRecall, precision_recall

__all__ = [
    "LPIPS",
    "FrechetDistance",
    "KernelDistance",
    "Moments",
    "PrecisionRecall",
    "clip_score",
    "cmmd",
    "frechet_distance",
    "kernel_inception_distance",
    "precision_recall",
    "psnr",
    "ssim",
]
