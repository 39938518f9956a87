"""GLM-Image's autoregressive stage (zai-org/GLM-Image): a small preview grid, then the grid for the diffusion stage.

It makes tokens, not pixels: diffusers' `GlmImagePipeline` turns them into an image.

    ar = AutoregressivePipeline.from_pretrained("zai-org/GLM-Image", subfolder="vision_language_encoder")
    token_BT = ar(prompt, height=1152, width=768, output_type="tokens").images
    pipe = GlmImagePipeline.from_pretrained("zai-org/GLM-Image", vision_language_encoder=None)
    prior = prior_token_ids(token_BT, 1152, 768)
    image = pipe(prompt, prior_token_ids=prior, height=1152, width=768).images[0]

A token stands for 32 x 32 pixels. Text to image only: prompts with images need the model's vision tower.

What was run: transformers' own classes on tiny random checkpoints, against transformers' `generate` and against
`GlmImagePipeline.generate_prior_tokens`. The published weights (9 B parameters) were not at hand.

Shapes: B images, R rows, W tokens of a window, h, w grid of tokens, T = h x w, V codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accel.errors import ConfigError, UnsupportedError

from .adapter import CheckpointAdapter, Layout, Prefix
from .loading import load_model, load_tokenizer

#: Pixels along an edge per token.
SCALE = 32
#: What the processor takes where nobody names a size: height, width.
SIZE = 1152, 768


class GlmImage(CheckpointAdapter):
    """GlmImageForConditionalGeneration with its processor's tokenizer and chat template."""

    name = "GLM-Image"
    makes_pixels = False
    model: Any

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        names = ("grid_bos_token", "grid_eos_token", "bos_token", "chat_template")
        if absent := [name for name in names if not getattr(tokenizer, name, None)]:
            raise UnsupportedError(
                f"its tokenizer has no {', '.join(absent)}, of which prompts are made: load the one of the "
                "checkpoint's processor"
            )
        if self.vocabulary > self.model.lm_head.out_features:
            raise UnsupportedError(
                f"its head gives {self.model.lm_head.out_features} logits for {self.vocabulary} image codes: "
                "no images"
            )

    @classmethod
    def load(cls, source: str, dtype: torch.dtype, **options: Any) -> GlmImage:
        """A folder with model and tokenizer; or, of a whole `GlmImagePipeline`, its vision_language_encoder,
        whose tokenizer is in the pipeline's `processor`."""
        from transformers import GlmImageForConditionalGeneration

        model = load_model(GlmImageForConditionalGeneration, source, dtype, **options)
        if options.get("subfolder") == "vision_language_encoder":
            options = {**options, "subfolder": "processor"}
        return cls(model, load_tokenizer(source, **options))

    @property
    def backbone(self) -> nn.Module:
        return self.model.model.language_model

    @property
    def vocabulary(self) -> int:
        return self.model.config.vq_config.num_embeddings

    def layout(self, height: int | None, width: int | None) -> Layout:
        height, width = height or SIZE[0], width or SIZE[1]
        if height <= 0 or width <= 0 or height % SCALE or width % SCALE:
            raise ConfigError(
                f"height and width must be multiples of {SCALE} pixels, got {height} and {width}"
            )
        rows, columns = height // SCALE, width // SCALE
        preview = math.prod(_preview(rows, columns))
        if not preview:
            raise ConfigError(f"{width}x{height} pixels are too long and thin: their preview would be empty")
        slots = preview + rows * columns
        return Layout(rows, columns, (-1,) * slots, picture=tuple(range(preview, slots)))

    def prefix(self, prompts: Sequence[str], layout: Layout, guided: bool) -> Prefix:
        if guided:
            raise UnsupportedError(
                "GLM-Image's tokens are made without guidance: leave guidance_scale at 1 and pass it to "
                "GlmImagePipeline, which guides the diffusion"
            )
        own, small = (layout.rows, layout.columns), _preview(layout.rows, layout.columns)
        begin, end = self.tokenizer.grid_bos_token, self.tokenizer.grid_eos_token
        grids = "".join(f"{begin}{rows} {columns}{end}" for rows, columns in (own, small))
        rows_of_ids = []
        for prompt in prompts:
            message = {"role": "user", "content": [{"type": "text", "text": prompt}]}
            text = self.tokenizer.apply_chat_template([message], tokenize=False)
            special = not text.startswith(self.tokenizer.bos_token)  # the template brings its own
            text = f"{text}{grids}{self.tokenizer.bos_token}"
            rows_of_ids.append(self.tokenizer(text, add_special_tokens=special).input_ids)
        embedding = self.model.get_input_embeddings()
        return Prefix.of_tokens(rows_of_ids, embedding, embedding.weight.device)

    def embed(self, token_BW: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(token_BW)  # codes come first in the shared vocabulary

    def positions(self, place_RW: Tensor, start_R: Tensor, layout: Layout) -> Tensor:
        """(3, R, W): time, row, column. A grid starts where the text or the grid before it reached to."""
        small_rows, small_columns = _preview(layout.rows, layout.columns)
        slot_RW = place_RW - start_R[:, None]
        large_RW = slot_RW - small_rows * small_columns
        small = large_RW < 0
        row = torch.where(small, slot_RW // small_columns, large_RW // layout.columns)
        column = torch.where(small, slot_RW % small_columns, large_RW % layout.columns)
        origin = start_R[:, None] + torch.where(small, 0, max(small_rows, small_columns))
        image_3RW = torch.stack([origin, origin + row, origin + column])
        return torch.where(slot_RW < 0, place_RW, image_3RW)

    def logits(self, hidden_RWD: Tensor) -> Tensor:
        # Behind the codes come begin and end of image, and spares: nothing that a slot can hold.
        return F.linear(hidden_RWD, self.model.lm_head.weight[: self.vocabulary])


def prior_token_ids(token_BT: Tensor, height: int, width: int) -> Tensor:
    """A finished image's tokens (B, T) → `GlmImagePipeline`'s `prior_token_ids` (B, 4 T).

    The diffusion stage has a token per 16 x 16 pixels: each is repeated along both edges.

    Args:
        height, width: in pixels, as the tokens were made.

    Raises:
        ConfigError: the tokens are not those of an image of this size.
    """
    rows, columns = height // SCALE, width // SCALE
    if token_BT.shape[1] != rows * columns:
        raise ConfigError(
            f"{width}x{height} pixels have {rows} x {columns} tokens, got {token_BT.shape[1]}: pass the height and "
            "width that the tokens were made with"
        )
    grid = token_BT.unflatten(1, (rows, columns))
    return grid.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)


def _preview(rows: int, columns: int) -> tuple[int, int]:
    """The small grid that comes first: about 256 tokens of the same shape, as GlmImageProcessor computes it."""
    ratio = rows / columns
    return int(math.sqrt(ratio) * (SCALE // 2)), int(math.sqrt(1 / ratio) * (SCALE // 2))


ADAPTER = GlmImage
