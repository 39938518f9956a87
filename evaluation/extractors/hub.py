"""CLIP and DINOv2 features through transformers, from a local folder or a hub id."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from accel.evaluation.errors import WeightsError
from accel.evaluation.textfiles import first_line
from accel.evaluation.weights import fingerprint

from .base import resize_and_crop

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ClipExtractor:
    """CLIP image embeddings (projected, not normalised) and, for CLIP score, text embeddings."""

    def __init__(self, source: str, *, device: str | torch.device = "cpu") -> None:
        from transformers import AutoTokenizer, CLIPModel

        self._model = load_model(CLIPModel, source).to(device)
        self._tokenizer = _from_pretrained(AutoTokenizer, source)
        self._size = self._model.config.vision_config.image_size
        self._device = device
        self.dim = self._model.config.projection_dim
        self.name = f"clip:{_label(source)}@{fingerprint(self._model)}"

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        pixels = resize_and_crop(images, self._size, self._size)
        pixels = _normalised(pixels, _CLIP_MEAN, _CLIP_STD).to(self._device)
        return _embedding(self._model.get_image_features(pixel_values=pixels)).float().cpu()

    @torch.inference_mode()
    def text(self, prompts: Sequence[str]) -> torch.Tensor:
        """Text embeddings (B, `dim`); prompts are cut at CLIP's 77 tokens."""
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(self._device)
        output = self._model.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
        return _embedding(output).float().cpu()


class Dinov2Extractor:
    """DINOv2 class-token features: 256-pixel shorter edge, 224 centre crop, as its own processor."""

    def __init__(self, source: str, *, device: str | torch.device = "cpu") -> None:
        from transformers import Dinov2Model

        self._model = load_model(Dinov2Model, source).to(device)
        self._device = device
        self.dim = self._model.config.hidden_size
        self.name = f"dinov2:{_label(source)}@{fingerprint(self._model)}"

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        pixels = _normalised(resize_and_crop(images, 256, 224), _IMAGENET_MEAN, _IMAGENET_STD)
        return self._model(pixels.to(self._device)).last_hidden_state[:, 0].float().cpu()


def _label(source: str) -> str:
    """A hub id as it is, of a folder its name: where it lies differs by machine, the weights do not."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def _embedding(output: Any) -> torch.Tensor:
    # transformers returned the projected embedding itself up to 5.22; since 5.23 an output object
    # whose pooler_output holds it. That change is what breaks torchmetrics' CLIPScore.
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def _normalised(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def load_model(cls: Any, source: str, hint: str = "") -> Any:
    """A transformers model with all of its weights; `WeightsError` in one line for whatever else is there.

    transformers draws weights that a file lacks, and warns: every number would be one of a random network.
    """
    model, info = _from_pretrained(cls, source, hint, output_loading_info=True)
    # A buffer (a table of positions, a loss's weights) is made by the class itself.
    drawn = {name for name, _ in model.named_parameters()} & set(info.get("missing_keys") or ())
    if drawn:
        first, more = min(drawn), f" and {len(drawn) - 1} more" if len(drawn) > 1 else ""
        raise WeightsError(
            f"{source}: {cls.__name__} cannot be loaded: {first}{more} is not in its weights; it is another model's, "
            "or damaged: download it anew"
        )
    return model.eval()


def _from_pretrained(cls: Any, source: str, hint: str = "", **options: Any) -> Any:
    cure = f"give a local folder with config.json, model.safetensors and tokenizer files, or a hub id{hint}"
    is_path = source.startswith((".", "/", "~")) or source.count("/") > 1  # no hub id looks like that
    if is_path and not Path(source).is_dir():
        raise WeightsError(f"{source}: {cls.__name__} cannot be loaded: there is no such folder ({cure})")
    try:
        return cls.from_pretrained(source, **options)
    # Files of every kind are read here, and each reader has exceptions of its own.
    except Exception as error:
        raise WeightsError(
            f"{source}: {cls.__name__} cannot be loaded: {first_line(error)} ({cure})"
        ) from error
