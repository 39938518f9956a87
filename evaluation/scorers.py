"""What `score` asks of an image: each scorer turns a batch of images into one record part per image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from . import metrics
from .extractors import ClipExtractor
from .geneval.metadata import Metadata
from .geneval.scorer import Detection, Rules, score
from .suites import Prompt

# images (B, 3, H, W) uint8 and their metadata -> detections per image. The metadata says which
# classes need a colour; a detector may ignore it.
Detector = Callable[[torch.Tensor, Sequence[Metadata]], list[list[Detection]]]


class Scorer(Protocol):
    """`metric` names what it measures and with what; `paired` ones also get the plain image."""

    metric: str
    higher_is_better: bool
    paired: bool

    def __call__(
        self, images: torch.Tensor, plain: torch.Tensor | None, prompts: Sequence[Prompt]
    ) -> list[dict[str, Any]]: ...


class PairScorer:
    """PSNR, SSIM or LPIPS to the plain image of the same prompt and seed."""

    paired = True

    def __init__(
        self,
        metric: str,
        function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        *,
        higher_is_better: bool,
    ) -> None:
        self.metric, self._function, self.higher_is_better = metric, function, higher_is_better

    def __call__(
        self, images: torch.Tensor, plain: torch.Tensor | None, prompts: Sequence[Prompt]
    ) -> list[dict[str, Any]]:
        assert plain is not None
        if images.shape != plain.shape:
            reason = (
                f"size {tuple(images.shape[-2:])} differs from the plain image's {tuple(plain.shape[-2:])}"
            )
            return [{"value": None, "reason": reason} for _ in prompts]
        try:
            values = self._function(images, plain).tolist()
        except ValueError as error:  # smaller than the metric's window
            return [{"value": None, "reason": str(error)} for _ in prompts]
        return [self._part(value) for value in values]

    @staticmethod
    def _part(value: float) -> dict[str, Any]:
        # JSON has no infinity, and a mean with one in it says nothing: identical pairs are counted.
        if math.isfinite(value):
            return {"value": value, "reason": ""}
        return {"value": None, "reason": "identical" if value > 0 else "not a number"}


class ClipScorer:
    """CLIP score of image and prompt."""

    paired = False
    higher_is_better = True

    def __init__(self, extractor: ClipExtractor) -> None:
        self._extractor = extractor
        self.metric = f"clip_score[{extractor.name}]"

    def __call__(
        self, images: torch.Tensor, plain: torch.Tensor | None, prompts: Sequence[Prompt]
    ) -> list[dict[str, Any]]:
        text = self._extractor.text([prompt.text for prompt in prompts])
        values = metrics.clip_score(self._extractor(images), text).tolist()
        return [{"value": value, "reason": ""} for value in values]


class DetectionScorer:
    """GenEval's rules over a detector's output; keeps what was seen and why it failed."""

    paired = False
    higher_is_better = True

    def __init__(self, metric: str, detect: Detector, rules: Rules | None = None) -> None:
        self.metric, self._detect, self._rules = metric, detect, rules

    def __call__(
        self, images: torch.Tensor, plain: torch.Tensor | None, prompts: Sequence[Prompt]
    ) -> list[dict[str, Any]]:
        wanted = [prompt.metadata for prompt in prompts if prompt.metadata is not None]
        assert len(wanted) == len(prompts)
        parts = []
        for detections, metadata in zip(self._detect(images, wanted), wanted, strict=True):
            verdict = score(detections, metadata, self._rules)
            parts.append(
                {
                    "value": float(verdict.correct),
                    "reason": verdict.reason,
                    "tag": verdict.tag,
                    "seen": [detection.to_dict() for detection in verdict.counted],
                }
            )
        return parts


def pixel_scorers() -> list[Scorer]:
    """PSNR and SSIM: need nothing but the images."""
    return [
        PairScorer("psnr", metrics.psnr, higher_is_better=True),
        PairScorer("ssim", metrics.ssim, higher_is_better=True),
    ]


def lpips_scorer(weights: str, *, device: str | torch.device = "cpu") -> Scorer:
    """LPIPS with torchvision's AlexNet file at `weights`."""
    model = metrics.LPIPS.load(weights).to(device)

    @torch.inference_mode()
    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return model(a.to(device), b.to(device)).cpu()

    return PairScorer("lpips[alex]", distance, higher_is_better=False)
