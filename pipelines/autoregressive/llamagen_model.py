"""LlamaGen (Sun et al. 2024, arXiv:2406.06525): its transformer and the decoder of its VQ tokenizer, minimal.

The modules carry the key names of the published checkpoints (github.com/FoundationVision/LlamaGen: `c2i_*.pt`,
`t2i_*.pt`, `vq_ds*.pt`) and nothing that inference does not need. All sizes are read from the state dict; only
the number of attention heads cannot be, and comes from the table of published models or an argument. The image
grid is not in the weights either: the caller knows it.

What was run: forwards against an independent implementation in the tests, on random weights under the published
key names. The published weights themselves (0.4-12 GB) were not at hand; names, shapes and arithmetic were taken
from the public code.

Shapes: R rows (B in the modules), W tokens fed, T keys and values, C width, D width of a head, V vocabulary.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from accel.errors import UnsupportedError, WeightsError

#: (layers, width) of the published models -> attention heads.
HEADS = {
    (12, 768): 12,  # B
    (24, 1024): 16,  # L
    (36, 1280): 20,  # XL
    (48, 1536): 24,  # XXL
    (48, 2560): 40,  # XXXL
    (22, 2048): 32,  # 1B
    (24, 3200): 32,  # 3B
    (32, 4096): 32,  # 7B
}
_Module = TypeVar("_Module", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class GptShape:
    """Sizes of a LlamaGen transformer.

    Attributes:
        classes: class labels of a class-conditional model, without the one that stands for "no class"; None
            for a text-conditional one.
        caption: width of the text features, of a text-conditional model; else None.
        prefix: tokens before the image: 1 for a class, 120 for text.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    classes: int | None
    caption: int | None
    prefix: int

    @classmethod
    def of(cls, state: Mapping[str, Tensor], heads: int | None = None) -> GptShape:
        """Read the sizes from a state dict.

        Args:
            heads: attention heads; None looks them up by (layers, width) among the published models.

        Raises:
            WeightsError: a key that the sizes are read from is missing.
            UnsupportedError: the number of heads is neither given nor known, or does not fit.
        """
        names = ("tok_embeddings.weight", "layers.0.attention.wqkv.weight", "layers.0.feed_forward.w1.weight")
        text = "cls_embedding.uncond_embedding" in state
        condition = "cls_embedding.uncond_embedding" if text else "cls_embedding.embedding_table.weight"
        missing = [name for name in (*names, condition) if name not in state]
        if missing:
            raise WeightsError(
                f"not a LlamaGen transformer: its state dict lacks {', '.join(missing)}. "
                f"It has {len(state)} keys, among them {', '.join(sorted(state)[:8])}."
            )
        vocabulary, width = state[names[0]].shape
        layers = 1 + max(int(m[1]) for name in state if (m := re.match(r"layers\.(\d+)\.", name)))
        if heads is None:
            heads = HEADS.get((layers, width))
        if heads is None or width % (4 * heads):
            known = ", ".join(f"{n} layers of {c}: {h}" for (n, c), h in HEADS.items())
            raise UnsupportedError(
                f"{layers} layers of width {width} with {heads} attention heads: pass heads=, a number with "
                f"width divisible by 4 x heads. The published models have {known}."
            )
        return cls(
            layers=layers,
            width=width,
            heads=heads,
            kv_heads=(state[names[1]].shape[0] - width) // 2 // (width // heads),
            feed_forward=state[names[2]].shape[0],
            vocabulary=vocabulary,
            classes=None if text else state[condition].shape[0] - 1,
            caption=state[condition].shape[1] if text else None,
            prefix=state[condition].shape[0] if text else 1,
        )


def rotary(slot_RW: Tensor, columns: int, head: int) -> Tensor:
    """Cosines and sines (R, W, D / 2, 2), float32, by which tokens at these slots of the image are turned.

    The first half of a head turns with the grid's row, the second with its column. Below slot 0, in the prefix,
    both are 0 and not the identity: the published code multiplies the prefix's queries and keys by 0, so every
    token reads the prefix with equal scores. The weights were trained with that, so it stays.
    """
    half = head // 2
    frequency = 10000.0 ** -(torch.arange(0, half, 2, device=slot_RW.device).float() / half)
    at = torch.stack([slot_RW // columns, slot_RW % columns], -1)
    angle_RWR = (at[..., None] * frequency).flatten(2)
    table = torch.stack([angle_RWR.cos(), angle_RWR.sin()], -1)
    return table * (slot_RW >= 0)[..., None, None]


def _turn(x_BWHD: Tensor, rotary_BWR2: Tensor) -> Tensor:
    """Rotate pairs of neighbouring channels, in float32."""
    even, odd = x_BWHD.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotary_BWR2[:, :, None].unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).type_as(x_BWHD)


class _Attention(nn.Module):
    def __init__(self, shape: GptShape, layer: int) -> None:
        super().__init__()
        self.layer, self.head = layer, shape.width // shape.heads
        self.sizes = [shape.width, shape.kv_heads * self.head, shape.kv_heads * self.head]
        self.grouped = shape.kv_heads != shape.heads
        self.wqkv = nn.Linear(shape.width, sum(self.sizes), bias=False)
        self.wo = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, rotary_BWR2: Tensor, mask: Tensor, cache: Any) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, self.head)) for part in self.wqkv(x).split(self.sizes, -1))
        q, k, v = _turn(q, rotary_BWR2).transpose(1, 2), _turn(k, rotary_BWR2), v.transpose(1, 2)
        k, v = cache.update(k.transpose(1, 2), v, self.layer)
        y = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=self.grouped)
        return self.wo(y.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, shape: GptShape) -> None:
        super().__init__()
        self.w1 = nn.Linear(shape.width, shape.feed_forward, bias=False)
        self.w3 = nn.Linear(shape.width, shape.feed_forward, bias=False)
        self.w2 = nn.Linear(shape.feed_forward, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class _Block(nn.Module):
    def __init__(self, shape: GptShape, layer: int) -> None:
        super().__init__()
        self.attention = _Attention(shape, layer)
        self.feed_forward = _FeedForward(shape)
        self.attention_norm = nn.RMSNorm(shape.width, eps=1e-5)
        self.ffn_norm = nn.RMSNorm(shape.width, eps=1e-5)

    def forward(self, x: Tensor, rotary_BWR2: Tensor, mask: Tensor, cache: Any) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary_BWR2, mask, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class _ClassEmbedding(nn.Module):
    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, label_B: Tensor) -> Tensor:
        return self.embedding_table(label_B)[:, None]


class _CaptionEmbedding(nn.Module):
    def __init__(self, caption: int, prefix: int, width: int) -> None:
        super().__init__()
        self.cap_proj = nn.ModuleDict(
            {"fc1": nn.Linear(caption, width, bias=False), "fc2": nn.Linear(width, width, bias=False)}
        )
        self.uncond_embedding = nn.Parameter(torch.empty(prefix, caption))

    def forward(self, features_BPE: Tensor) -> Tensor:
        return self.cap_proj["fc2"](F.gelu(self.cap_proj["fc1"](features_BPE), approximate="tanh"))


class Gpt(nn.Module):
    """The transformer. Without dropout, mask or cache of its own: the caller brings the latter two."""

    def __init__(self, shape: GptShape) -> None:
        super().__init__()
        self.shape = shape
        self.cls_embedding: nn.Module
        if shape.classes is not None:
            self.cls_embedding = _ClassEmbedding(shape.classes, shape.width)
        else:
            assert shape.caption is not None
            self.cls_embedding = _CaptionEmbedding(shape.caption, shape.prefix, shape.width)
        self.tok_embeddings = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(_Block(shape, layer) for layer in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=1e-5)
        self.output = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, x_BWC: Tensor, rotary_BWR2: Tensor, mask: Tensor, cache: Any) -> Tensor:
        """Normalised hidden states (B, W, C) of W embedded tokens; `output` turns them into logits.

        Args:
            rotary_BWR2: what `rotary` gives for their slots.
            mask: broadcasts to (B, heads, W, T): bool (True is seen) or added to the scores.
            cache: has transformers' `Cache.update(keys, values, layer)`; keys and values are (B, heads, W, D),
                and what it returns, (B, heads, T, D), is what is attended to.
        """
        for block in self.layers:
            x_BWC = block(x_BWC, rotary_BWR2, mask, cache)
        return self.norm(x_BWC)


def read(file: str | Path) -> dict[str, Tensor]:
    """A state dict from a `.safetensors` or a PyTorch file, on the CPU.

    Never unpickles code: PyTorch files are read with `weights_only`. Training checkpoints keep the weights
    under "model" (DDP), "module" (DeepSpeed) or "state_dict", with "ema" beside them; published samplers take
    the former, so does this.

    Raises:
        WeightsError: missing, corrupt, or with anything but tensors where the weights should be.
    """
    try:
        if Path(file).suffix == ".safetensors":
            return load_file(file)
        # The training script's arguments lie beside the weights; a Namespace is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, UnpicklingError, SafetensorError) as error:
        raise WeightsError(f"{file}: cannot be read as a state dict: {error}") from error
    for name in ("model", "module", "state_dict", "ema"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"{file}: no state dict of tensors, neither at the top nor under 'model' or 'ema'")
    return dict(content)


def fill(module: _Module, state: Mapping[str, Tensor], unused: tuple[str, ...] = ()) -> _Module:
    """Put a state dict into a module made on the meta device; eval mode, no gradients.

    Args:
        unused: beginnings of keys that the module does without.

    Raises:
        WeightsError: keys that are unknown, missing or of another shape; all of them are listed.
    """
    own = module.state_dict()
    wrong = {
        "unknown keys": [name for name in state if name not in own and not name.startswith(unused)],
        "missing keys": [name for name in own if name not in state],
        "shapes that do not fit": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ],
    }
    if any(wrong.values()):
        listed = "; ".join(f"{kind}: {', '.join(sorted(names))}" for kind, names in wrong.items() if names)
        raise WeightsError(f"the state dict is not that of {type(module).__name__}: {listed}")
    module.load_state_dict({name: state[name] for name in own}, assign=True)
    return module.eval().requires_grad_(False)


def load_gpt(state: Mapping[str, Tensor], heads: int | None = None) -> Gpt:
    """A transformer with the state dict's weights and dtype. Errors: `GptShape.of` and `fill`."""
    shape = GptShape.of(state, heads)
    with torch.device("meta"):
        module = Gpt(shape)
    return fill(module, state, unused=("freqs_cis",))  # older checkpoints carry the rotary table
