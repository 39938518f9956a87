"""GenEval's detector stage on transformers: Mask2Former (Cheng et al., 2112.01527) and CLIP colours.

The official stage runs mmdetection 2.x, which no longer installs. Here the same published model
family runs through transformers, with mmdetection's post-processing written out; transformers' own
resizes every mask to 384 x 384 and returns no boxes. Until parity with the official tool has been
measured, results are named "GenEval (transformers port)".

Shapes: Q queries, C classes, (h, w) mask logits, (H, W) image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from accel.evaluation.errors import EvaluationError
from accel.evaluation.extractors.hub import ClipExtractor, load_model

from .metadata import COLORS, Metadata
from .scorer import Box, Detection, Rules

_SHORT_EDGE, _LONG_EDGE = 800, 1333
_MAX_INSTANCES = 100
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_GREY = 0x99
_TEMPLATES = (
    "a photo of a {color} {label}",
    "a photo of a {color}-colored {label}",
    "a photo of a {color} object",
)
# GenEval's class names where they differ from COCO's, and COCO's where checkpoints differ among themselves.
_RENAMED = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}


class Mask2FormerDetector:
    """Detector for `DetectionScorer`: images (B, 3, H, W) uint8 and metadata -> detections per image.

    Args:
        detector: folder or hub id, e.g. facebook/mask2former-swin-small-coco-instance.
        clip: folder or hub id of CLIP ViT-L/14, for colours.
    """

    def __init__(self, detector: str, clip: str, *, device: str | torch.device = "cpu") -> None:
        from transformers import Mask2FormerForUniversalSegmentation

        self._model: Any = load_model(
            Mask2FormerForUniversalSegmentation, detector, "; scipy must be installed"
        )
        self._model.to(device)
        self._device = device
        names = self._model.config.id2label or {}
        self.labels = {int(number): geneval_label(name) for number, name in names.items()}
        self._colors = ColorClassifier(ClipExtractor(clip, device=device))

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, metadata: Sequence[Metadata]) -> list[list[Detection]]:
        check_labels(metadata, set(self.labels.values()))
        results = []
        # One by one: mmdetection's resize depends on the image's shape, and padding changes features.
        for image, line in zip(images, metadata, strict=True):
            pixels, (height, width) = preprocess(image)
            output = self._model(pixel_values=pixels.to(self._device))
            masks = output.masks_queries_logits.float()
            # Masks come at a quarter of the padded size: bring them to it, then cut the padding off.
            masks = F.interpolate(masks, pixels.shape[-2:], mode="bilinear", align_corners=False)
            found = instances(
                output.class_queries_logits[0].float(),
                masks[0, :, :height, :width],
                (image.shape[1], image.shape[2]),
                self.labels,
            )
            colored = {spec.label for spec in line.include if spec.color is not None}
            results.append([self._with_color(image, d, mask, colored) for d, mask in found])
        return results

    def _with_color(
        self, image: torch.Tensor, detection: Detection, mask: torch.Tensor, colored: set[str]
    ) -> Detection:
        if detection.label not in colored or detection.confidence <= Rules().threshold:
            return detection
        color = self._colors(image, mask, detection.box, detection.label)
        return Detection(detection.label, detection.confidence, detection.box, color)


class ColorClassifier:
    """Colour of one object: CLIP zero-shot over ten colours and three templates on the crop, with
    everything outside the object's mask grey."""

    def __init__(self, clip: ClipExtractor) -> None:
        self._clip = clip
        self._text: dict[str, torch.Tensor] = {}

    def __call__(self, image: torch.Tensor, mask: torch.Tensor, box: Box, label: str) -> str:
        x0, y0, x1, y1 = (round(edge) for edge in box)
        grey = torch.where(mask.cpu(), image.cpu(), torch.tensor(_GREY, dtype=torch.uint8))
        features = F.normalize(self._clip(grey[None, :, y0:y1, x0:x1]))
        return COLORS[int((features @ self._embeddings(label).T).argmax())]

    def _embeddings(self, label: str) -> torch.Tensor:
        if label not in self._text:
            prompts = [
                template.format(color=color, label=label) for color in COLORS for template in _TEMPLATES
            ]
            text = F.normalize(self._clip.text(prompts)).view(len(COLORS), len(_TEMPLATES), -1)
            self._text[label] = F.normalize(text.mean(1))
        return self._text[label]


def instances(
    class_logits_QC: torch.Tensor,
    mask_logits_Qhw: torch.Tensor,
    size: tuple[int, int],
    labels: Mapping[int, str],
) -> list[tuple[Detection, torch.Tensor]]:
    """Detections and their masks (H, W), as mmdetection makes them from Mask2Former's output.

    The last class is "no object". The 100 best (query, class) pairs are kept; confidence is the class
    probability times the mean mask probability inside the mask; the box encloses the mask.
    """
    probabilities = class_logits_QC.softmax(-1)[:, :-1]
    scores, chosen = probabilities.flatten().topk(min(_MAX_INSTANCES, probabilities.numel()))
    queries, classes = chosen // probabilities.shape[1], chosen % probabilities.shape[1]
    needed, place = queries.unique(return_inverse=True)
    masks = F.interpolate(mask_logits_Qhw[needed][:, None], size, mode="bilinear", align_corners=False)[:, 0]
    binary = masks > 0
    inside = (masks.sigmoid() * binary).sum((1, 2)) / (binary.sum((1, 2)) + 1e-6)
    found = []
    for score, label, row in zip(scores.tolist(), classes.tolist(), place.tolist(), strict=True):
        if binary[row].any():
            confidence = score * float(inside[row])
            found.append((Detection(labels[label], confidence, _box(binary[row])), binary[row]))
    return found


def preprocess(image: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """(3, H, W) uint8 -> (1, 3, h, w) and the size without padding: shorter edge 800, longer at most
    1333, ImageNet's statistics, padded right and below to a multiple of 32."""
    height, width = image.shape[1:]
    scale = min(_SHORT_EDGE / min(height, width), _LONG_EDGE / max(height, width))
    target = (int(width * scale + 0.5), int(height * scale + 0.5))
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).resize(target, Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    pixels = (pixels - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1)
    return F.pad(pixels, (0, -target[0] % 32, 0, -target[1] % 32)), (target[1], target[0])


def geneval_label(name: str) -> str:
    """A checkpoint's class name as GenEval spells it."""
    name = name.replace("_", " ").strip().lower()
    return _RENAMED.get(name, name)


def check_labels(metadata: Sequence[Metadata], labels: set[str]) -> None:
    """Refuse prompts about classes the detector does not know: every image would silently fail."""
    wanted = {spec.label for line in metadata for spec in (*line.include, *line.exclude)}
    if unknown := sorted(wanted - labels):
        raise EvaluationError(
            f"the detector has no class {', '.join(unknown)}; it has {', '.join(sorted(labels))}"
        )


def _box(mask: torch.Tensor) -> Box:
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
