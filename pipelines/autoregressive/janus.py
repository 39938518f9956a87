"""Janus and Janus-Pro (Chen et al. 2025, arXiv 2501.17811), as transformers saves them.

Image tokens have an embedding, a projection and a head of their own, apart from the text's. The unconditional
prompt is the conditional one with everything but its first and its begin-of-image token replaced by padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accel.errors import UnsupportedError

from .adapter import CheckpointAdapter, Layout, Prefix, only_size
from .loading import load_model, load_tokenizer, read_json

#: Where processors say how pixels were normalised: transformers 5 nests it, older checkpoints have it apart.
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


class Janus(CheckpointAdapter):
    """JanusForConditionalGeneration with its own tokenizer; images have one size, set by the checkpoint."""

    name = "Janus"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        super().__init__(model, tokenizer)
        self.mean, self.std = tuple(mean), tuple(std)
        self._codebook_VD: Tensor | None = None
        generation = model.generation_config
        own = getattr(generation, "generation_kwargs", None) or {}
        self.special = {
            "begin of sequence": _first(generation.bos_token_id, tokenizer.bos_token_id),
            "begin of image": _first(
                own.get("boi_token_id"),
                tokenizer.convert_tokens_to_ids(getattr(tokenizer, "boi_token", None)),
            ),
            "padding": _first(generation.pad_token_id, tokenizer.pad_token_id),
        }
        if unknown := [name for name, token in self.special.items() if token is None]:
            raise UnsupportedError(
                f"neither generation_config.json nor the tokenizer says which token is: {', '.join(unknown)}. "
                "Without it this Janus checkpoint cannot make images"
            )

    @classmethod
    def load(cls, source: str, dtype: torch.dtype, **options: Any) -> Janus:
        from transformers import JanusForConditionalGeneration

        model = load_model(JanusForConditionalGeneration, source, dtype, **options)
        # The tokenizer alone: JanusProcessor needs torchvision, for images that go in.
        tokenizer = load_tokenizer(source, **options)
        for name in _PROCESSOR_FILES:
            found = read_json(source, name, **options) or {}
            pixels = found.get("image_processor", found)
            if "image_mean" in pixels and "image_std" in pixels:
                return cls(model, tokenizer, pixels["image_mean"], pixels["image_std"])
        return cls(model, tokenizer)

    @property
    def backbone(self) -> nn.Module:
        return self._janus.language_model

    @property
    def vocabulary(self) -> int:
        return int(self._janus.vqmodel.config.num_embeddings)

    @property
    def codebook_VD(self) -> Tensor:
        """Codes of length 1, as the VQ model compares and decodes them."""
        code_VD = self._janus.vqmodel.quantize.embedding.weight
        if self._codebook_VD is None or self._codebook_VD.device != code_VD.device:
            self._codebook_VD = F.normalize(code_VD.detach(), dim=-1)
        return self._codebook_VD

    @property
    def _janus(self) -> Any:
        return self.model.model

    def layout(self, height: int | None, width: int | None) -> Layout:
        rows, columns = self._janus.vqmodel.quantize.quant_state_dims
        scale = 2 ** (len(self._janus.vqmodel.config.channel_multiplier) - 1)
        only_size(height, width, rows * scale, columns * scale)
        return Layout.plain(rows, columns)

    def prefix(self, prompts: Sequence[str], layout: Layout, guided: bool) -> Prefix:
        texts = [f"{prompt}{self.tokenizer.boi_token}" for prompt in prompts]
        rows = self.tokenizer(texts)["input_ids"]
        kept = (self.special["begin of sequence"], self.special["begin of image"])
        if guided:
            rows += [[token if token in kept else self.special["padding"] for token in row] for row in rows]
        return Prefix.of_tokens(rows, self.model.get_input_embeddings(), self.model.device)

    def embed(self, token_BW: Tensor) -> Tensor:
        return self.model.prepare_embeddings_for_image_generation(token_BW)

    def logits(self, hidden_RWD: Tensor) -> Tensor:
        return self._janus.generation_head(hidden_RWD)

    def images(self, token_BT: Tensor, layout: Layout) -> Tensor:
        pixels_B3HW = self._janus.vqmodel.decode(token_BT).float()
        mean, std = (pixels_B3HW.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels_B3HW * std + mean).clamp(0, 1)


def _first(*values: Any) -> Any:
    """The first that is not None; of several ids the first, as transformers takes it."""
    value = next((value for value in values if value is not None), None)
    return value[0] if isinstance(value, list) else value


ADAPTER = Janus
