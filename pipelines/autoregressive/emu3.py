"""Emu3 (Wang et al. 2024, arXiv:2409.18869): one vocabulary for text and images, an end-of-line token per row.

    pipe = AutoregressivePipeline.from_pretrained("BAAI/Emu3-Gen-hf", dtype=torch.bfloat16).to("cuda")
    image = pipe("a portrait of a young girl. masterpiece, film grained, best quality.").images[0]

An image of h x w codes is h lines of w codes and an end-of-line token. What follows the last code (its end of
line, end of frame, end of image, end of sequence) never changes and is not decoded.

What was run: transformers' own classes on tiny random checkpoints, against transformers' `generate`, constrained
as its documentation shows. The published weights (8 B parameters) were not at hand.

Shapes: B images, R rows, W tokens of a window, V codes, D width, h, w grid of codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accel.errors import ConfigError, UnsupportedError, WeightsError

from .adapter import CheckpointAdapter, Defaults, Layout, Prefix
from .loading import load_model, quiet_imports

#: What guidance leads away from, as in the authors' own example (github.com/baaivision/Emu3).
NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst "
    "quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)

#: Pixels, where the processor does not say: transformers 5.0 keeps this among a call's defaults.
_AREA = 720 * 720


class Emu3(CheckpointAdapter):
    """Emu3's image generation.

    Attributes:
        negative_prompt: of the unconditional rows; they get the same image header as the conditional ones, as
            in the authors' code (transformers' documentation leaves it out). Set it to change it.
    """

    name = "Emu3"
    model: Any

    def __init__(self, model: nn.Module, processor: Any) -> None:
        super().__init__(model, processor.tokenizer)
        self.processor, self.negative_prompt = processor, NEGATIVE_PROMPT
        mapping = self.model.model.vocabulary_mapping  # transformers 5.0 has it there alone
        code_ids = [mapping.img2bpe.get(code) for code in range(self.vocabulary)]
        if None in code_ids or mapping.eol_token_id is None:
            raise UnsupportedError(
                f"its vocabulary has {len(mapping.img2bpe)} of {self.vocabulary} image codes (<|visual token ...|>) "
                f"and {'an' if mapping.eol_token_id is not None else 'no'} end of line (<|extra_200|>): no images"
            )
        first = code_ids[0]
        assert first is not None
        # In the published vocabulary the codes stand together: then their part of the head is a view.
        self._slice = (
            slice(first, first + self.vocabulary)
            if code_ids == [*range(first, first + len(code_ids))]
            else None
        )
        # A buffer moves with the model. Ids here: codes, then V for the end of line.
        ids = torch.tensor([*code_ids, mapping.eol_token_id])
        model.register_buffer("accel_token_ids", ids, persistent=False)

    @classmethod
    def load(cls, source: str, dtype: torch.dtype, **options: Any) -> Emu3:
        from transformers import Emu3ForConditionalGeneration, Emu3Processor

        model = load_model(Emu3ForConditionalGeneration, source, dtype, **options)
        try:
            with quiet_imports():
                processor = Emu3Processor.from_pretrained(source, **options)
        except (OSError, ValueError) as error:
            raise WeightsError(f"{source}: its processor cannot be loaded: {error}") from error
        return cls(model, processor)

    @property
    def backbone(self) -> nn.Module:
        return self.model.model.text_model

    @property
    def vocabulary(self) -> int:
        return self.model.config.vq_config.codebook_size

    @property
    def codebook_VD(self) -> Tensor:
        return self.model.model.vqmodel.quantize.embedding.weight

    def defaults(self) -> Defaults:
        """The checkpoint's, and where it says nothing the authors' example: guidance 3, top-k 2048."""
        given = self.model.generation_config
        return Defaults(
            guidance_scale=3.0 if given.guidance_scale is None else given.guidance_scale,
            temperature=1.0 if given.temperature is None else given.temperature,
            top_k=2048 if given.top_k is None else given.top_k,
            top_p=given.top_p,
        )

    def layout(self, height: int | None, width: int | None) -> Layout:
        """Any multiple of 8 pixels; by default the square of the processor's own area, 720 x 720."""
        scale = self.model.model.vqmodel.spatial_scale_factor
        area = getattr(self.processor, "image_area", _AREA)
        own = round(area**0.5 / self.processor.downsample_ratio) * scale
        height, width = height or own, width or own
        if height <= 0 or width <= 0 or height % scale or width % scale:
            raise ConfigError(
                f"height and width must be multiples of {scale} pixels, got {height} and {width}"
            )
        rows, columns = height // scale, width // scale
        line = (-1,) * columns
        return Layout(rows, columns, (*line, self.vocabulary) * (rows - 1) + line)

    def prefix(self, prompts: Sequence[str], layout: Layout, guided: bool) -> Prefix:
        texts = [*prompts, *[self.negative_prompt] * (len(prompts) if guided else 0)]
        factor = self.processor.downsample_ratio
        inputs = self.processor(
            text=texts,
            return_for_image_generation=True,
            # It computes rows and columns from pixels: of these, exactly the layout's come out.
            ratio=f"{layout.columns}:{layout.rows}",
            image_area=layout.rows * layout.columns * factor**2,
        )
        assert list(inputs["image_sizes"][0]) == [layout.rows, layout.columns]
        embedding = self.model.get_input_embeddings()
        return Prefix.of_tokens(inputs["input_ids"], embedding, embedding.weight.device)

    def embed(self, token_BW: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(self.model.accel_token_ids[token_BW])

    def logits(self, hidden_RWD: Tensor) -> Tensor:
        head = self.model.lm_head
        if self._slice is not None:
            return F.linear(hidden_RWD, head.weight[self._slice])
        return head(hidden_RWD)[..., self.model.accel_token_ids[:-1]]

    def images(self, token_BT: Tensor, layout: Layout) -> Tensor:
        pixels = self.model.model.vqmodel.decode(token_BT.unflatten(1, (layout.rows, layout.columns)))
        normalised = self.processor.image_processor
        mean, std = (
            torch.tensor(values, device=pixels.device).view(-1, 1, 1)
            for values in (normalised.image_mean, normalised.image_std)
        )
        return (pixels.float() * std + mean).clamp(0, 1)


ADAPTER = Emu3
