"""What accel knows about families of autoregressive image models: one `CheckpointAdapter` class each, in one small file.

An adapter is a loaded checkpoint behind a few questions: how prompts are embedded, how image tokens are embedded,
where logits come from, which slots an image has, and how finished tokens become pixels. Caches, masks, guidance,
batches and sampling are none of its business (`model.py`). It is found by the model's class name
(`registry.py`), so that no model is imported to know it.

Rows are sequences that go through the model: B images without guidance; with it 2 B, the B conditional rows
first, then the B unconditional ones. A place is an index into a row's own sequence, from 0: the prompt's tokens,
then the image's slots. A slot is an index into the image's tokens, forced ones included. No row is ever padded on
the left: all start at place 0, and the image of row r starts at place `length_R[r]`.

Shapes: R rows, P prompt tokens of the longest row, W tokens of a window, N slots, V vocabulary, D width of the
model, B images, T = rows x columns tokens of a finished image.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from accel.errors import ConfigError

from .stack import Stack, llama


@dataclass(frozen=True)
class Layout:
    """The slots of an image. Plain data, the same for all images of a batch.

    Attributes:
        rows, columns: of the token grid of a finished image.
        forced: for each of the N slots the token that stands there (ends of line), -1 where it is sampled.
        picture: the slots that make up the finished image, row by row; None: all sampled ones.
    """

    rows: int
    columns: int
    forced: tuple[int, ...]
    picture: tuple[int, ...] | None = None

    @staticmethod
    def plain(rows: int, columns: int) -> Layout:
        """Nothing but the image's own tokens, row by row."""
        return Layout(rows, columns, (-1,) * (rows * columns))

    @property
    def slots(self) -> int:
        """N."""
        return len(self.forced)

    @property
    def row(self) -> int:
        """How many slots after a token the one right below it stands."""
        if self.picture is not None:
            return self.columns
        return -(-self.slots // self.rows)  # the last row may have no end of line

    def finished(self, token_BN: Tensor) -> Tensor:
        """Tokens of all slots (B, N) → those of the finished image (B, rows * columns), row by row."""
        picture = self.picture
        if picture is None:
            picture = tuple(slot for slot, token in enumerate(self.forced) if token < 0)
        assert len(picture) == self.rows * self.columns, "the layout's picture does not fill its grid"
        return token_BN[:, torch.tensor(picture, device=token_BN.device)]


@dataclass(frozen=True)
class Prefix:
    """The embedded prompts: all that stands before the image's slots.

    Attributes:
        embedding_RPD: padded on the right; what stands beyond a row's length is never seen.
        lengths: tokens of each of the R rows.
    """

    embedding_RPD: Tensor
    lengths: tuple[int, ...]

    @staticmethod
    def of_tokens(
        rows: Sequence[Sequence[int]], embed: Callable[[Tensor], Tensor], device: torch.device
    ) -> Prefix:
        """Token ids of each row, of any lengths, embedded by `embed` ((R, P) int64 → (R, P, D))."""
        lengths = tuple(len(row) for row in rows)
        # The padding is never seen: any id that can be embedded will do.
        padded = [[*row, *[row[-1]] * (max(lengths) - len(row))] for row in rows]
        return Prefix(embed(torch.tensor(padded, device=device)), lengths)


@dataclass(frozen=True)
class Defaults:
    """What a call uses where the user says nothing."""

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


class CheckpointAdapter(ABC):
    """A loaded checkpoint of one model family. Subclasses name the family and answer the abstract questions.

    `embed`, `positions`, `hidden` and `logits` run once per forward and may be traced by torch.compile or
    captured in a CUDA graph: tensors in, tensors out, no waiting for the device.

    Attributes:
        name: of the family, for messages.
        prompt_types: what a prompt can be.
        makes_pixels: whether `images` decodes tokens; else only output_type="tokens" is there.
        model: the whole model, in eval mode.
        tokenizer: what turns prompts into ids; None where there is nothing to tokenize.
    """

    name: ClassVar[str]
    prompt_types: ClassVar[tuple[type, ...]] = (str,)
    makes_pixels: ClassVar[bool] = True

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        self.model: Any = model  # transformers' attributes are not typed
        self.tokenizer = tokenizer

    @classmethod
    @abstractmethod
    def load(cls, source: str, dtype: torch.dtype, **options: Any) -> CheckpointAdapter:
        """Load a checkpoint on the CPU (`loading.load_model` does it for transformers' classes).

        Args:
            source: folder or hub id.
            dtype: of the weights.
            options: `from_pretrained`'s own (subfolder, revision, cache_dir, token, local_files_only).

        Raises:
            WeightsError: missing, corrupt or pickled weights.
            UnsupportedError: the checkpoint cannot make images.
        """

    # What is known when the model is loaded.

    @property
    @abstractmethod
    def backbone(self) -> nn.Module:
        """The causal transformer: takes inputs_embeds, attention_mask, position_ids and a cache."""

    @cached_property
    def cache_argument(self) -> str:
        """What the backbone calls its cache: `cache` from transformers 5.24 on, `past_key_values` before. Read
        from the signature, so that any release that has either is fine; asked for first outside of compiled code."""
        return (
            "cache" if "cache" in inspect.signature(self.backbone.forward).parameters else "past_key_values"
        )

    @cached_property
    def takes_cache_position(self) -> bool:
        """transformers 5.0 counts the cache's tokens unless it is told where it is; later releases do not ask."""
        return "cache_position" in inspect.signature(self.backbone.forward).parameters

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """V: an image slot holds one of 0 ... V - 1, whatever the model's own numbering is."""

    @property
    def codebook_VD(self) -> Tensor | None:
        """The code that each token stands for, for methods that ask how alike tokens are; None: not offered.

        The same tensor at every call while the model stays where it is: what is derived from it can be kept.
        """
        return None

    @property
    def layers(self) -> int:
        """How many layers of the backbone keep keys and values."""
        config: Any = self.backbone.config
        return int(config.num_hidden_layers)

    @property
    def context(self) -> int | None:
        """The most places a sequence can have; None: no limit."""
        config: Any = self.backbone.config
        return getattr(config, "max_position_embeddings", None)

    def defaults(self) -> Defaults:
        """From the checkpoint's generation configuration."""
        config = getattr(self.model, "generation_config", None)
        given = {name: getattr(config, name, None) for name in Defaults.__dataclass_fields__}
        return Defaults(**{name: value for name, value in given.items() if value is not None})

    # Before the first forward.

    @abstractmethod
    def layout(self, height: int | None, width: int | None) -> Layout:
        """The slots of an image of this size in pixels; None: the model's own.

        Raises:
            ConfigError: a size that the model cannot make (`only_size` for models with one size).
        """

    @abstractmethod
    def prefix(self, prompts: Sequence[Any], layout: Layout, guided: bool) -> Prefix:
        """Prompts → embedded rows, one per prompt; if `guided`, then as many unconditional rows after them."""

    # In every forward.

    @abstractmethod
    def embed(self, token_BW: Tensor) -> Tensor:
        """Image tokens, forced ones included → input embeddings (B, W, D)."""

    @abstractmethod
    def logits(self, hidden_RWD: Tensor) -> Tensor:
        """The backbone's last hidden states → logits (R, W, V) of the next image token."""

    def positions(self, place_RW: Tensor, start_R: Tensor, layout: Layout) -> Tensor:
        """The backbone's position ids for places, by default the places themselves.

        Places below start_R[r] are the prompt's, others the image's: slot = place - start. Slots from N on may
        be asked for; what they give does not matter, but a table must not be read beyond its end.
        """
        return place_RW

    def hidden(self, embedding_RWD: Tensor, bias_R1WS: Tensor, position: Tensor, key_values: Any) -> Tensor:
        """Last hidden states (R, W, D) of the backbone.

        Args:
            bias_R1WS: added to the attention scores of the S cached places: 0 or minus infinity.
            position: what `positions` gave.
            key_values: transformers' `Cache`: `update(key, value, layer)` gives the keys and values to see.
        """
        cache = {self.cache_argument: key_values}
        if self.takes_cache_position:  # of no effect beside a mask of four dimensions and positions
            cache["cache_position"] = torch.arange(embedding_RWD.shape[1], device=embedding_RWD.device)
        return self.backbone(
            inputs_embeds=embedding_RWD,
            attention_mask=bias_R1WS,
            position_ids=position,
            use_cache=True,
            **cache,
        ).last_hidden_state

    # The same, for families whose layers `stack` knows.

    def stack(self) -> Stack | None:
        """The backbone's layers in fewer kernels, instead of `hidden`; None: not known for this family or model."""
        return llama(self.backbone)

    def rotary(self, embedding_RWD: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (R, W, E) for what `positions` gave."""
        backbone: Any = self.backbone
        return backbone.rotary_emb(embedding_RWD, position)

    # After the last.

    def images(self, token_BT: Tensor, layout: Layout) -> Tensor:
        """Tokens of finished images (what `layout.finished` gives) → (B, 3, H, W) float in [0, 1].

        To be overridden where `makes_pixels` is true.
        """
        raise NotImplementedError


def only_size(height: int | None, width: int | None, own_height: int, own_width: int) -> None:
    """For models with one image size.

    Raises:
        ConfigError: another size was asked for.
    """
    if (height or own_height, width or own_width) != (own_height, own_width):
        raise ConfigError(
            f"this model makes images of {own_width}x{own_height} pixels only, not "
            f"{width or own_width}x{height or own_height}; leave height and width out"
        )
