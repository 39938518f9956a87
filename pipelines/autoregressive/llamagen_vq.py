"""The decoder of LlamaGen's VQ tokenizers (arXiv:2406.06525): `vq_ds16_c2i.pt`, `vq_ds16_t2i.pt`, `vq_ds8_c2i.pt`.

Carries the key names of the published checkpoints; the encoder's are left out. All sizes are read from the state
dict. What was run: see `llamagen_model`.

Shapes: B images, h, w grid of codes, V codes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accel.errors import WeightsError

from .llamagen_model import fill

_GROUPS = 32  # of every group norm, whatever its width


class _Residual(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_GROUPS, channels_in, eps=1e-6)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(_GROUPS, channels_out, eps=1e-6)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class _PixelAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(_GROUPS, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (part(y).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + self.proj_out(y.reshape(x.shape))


class _Stage(nn.Module):
    """Residual blocks of one resolution, with attention if it is the coarsest, and the step to the next."""

    def __init__(self, channels: list[tuple[int, int]], attention: bool, upsample: bool) -> None:
        super().__init__()
        out = channels[-1][1]
        self.res = nn.ModuleList(_Residual(i, o) for i, o in channels)
        self.attn = nn.ModuleList(_PixelAttention(o) for _, o in channels) if attention else None
        self.upsample = nn.ModuleDict({"conv": nn.Conv2d(out, out, 3, padding=1)}) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn is not None:
                x = self.attn[i](x)
        return x if self.upsample is None else self.upsample["conv"](F.interpolate(x, scale_factor=2.0))


class _Decoder(nn.Module):
    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        found = (re.match(r"decoder\.conv_blocks\.(\d+)\.res\.(\d+)\.conv1\.weight", name) for name in state)
        blocks = sorted((int(m[1]), int(m[2])) for m in found if m)
        top, latent = state["decoder.conv_in.weight"].shape[:2]
        self.conv_in = nn.Conv2d(latent, top, 3, padding=1)
        self.mid = nn.ModuleList([_Residual(top, top), _PixelAttention(top), _Residual(top, top)])
        self.conv_blocks = nn.ModuleList()
        for stage in range(1 + blocks[-1][0]):
            name = f"decoder.conv_blocks.{stage}"
            shapes = [state[f"{name}.res.{i}.conv1.weight"].shape for at, i in blocks if at == stage]
            if not shapes:
                raise WeightsError(f"a stage of the VQ decoder is missing: no key begins with {name}.res")
            self.conv_blocks.append(
                _Stage(
                    [(shape[1], shape[0]) for shape in shapes],
                    attention=f"{name}.attn.0.q.weight" in state,
                    upsample=f"{name}.upsample.conv.weight" in state,
                )
            )
        out = state["decoder.conv_out.weight"]
        self.norm_out = nn.GroupNorm(_GROUPS, out.shape[1], eps=1e-6)
        self.conv_out = nn.Conv2d(out.shape[1], out.shape[0], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VqDecoder(nn.Module):
    """From codes to pixels. Built after a state dict, from which all sizes are read.

    Attributes:
        scale: pixels along an edge of the image per code: 16 (`vq_ds16`) or 8 (`vq_ds8`).
        codebook: (V, 8) codes of length 1, as training compared and decoded them; set once the weights are there.
    """

    codebook: Tensor

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        needed = (
            "quantize.embedding.weight",
            "decoder.conv_in.weight",
            "decoder.conv_out.weight",
            "decoder.conv_blocks.0.res.0.conv1.weight",
        )
        missing = [name for name in needed if name not in state]
        if missing:
            raise WeightsError(
                f"not a LlamaGen VQ tokenizer: its state dict lacks {', '.join(missing)}. "
                f"It has {len(state)} keys, among them {', '.join(sorted(state)[:8])}."
            )
        codes, channels = state["quantize.embedding.weight"].shape
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(codes, channels)})
        self.post_quant_conv = nn.Conv2d(channels, state["decoder.conv_in.weight"].shape[1], 1)
        self.decoder = _Decoder(state)
        stages = [
            name for name in state if re.fullmatch(r"decoder\.conv_blocks\.\d+\.upsample\.conv\.weight", name)
        ]
        self.scale = 2 ** len(stages)

    def forward(self, code_Bhw: Tensor) -> Tensor:
        """Codes (B, h, w) -> pixels (B, 3, scale * h, scale * w), about -1 to 1."""
        latent = self.codebook[code_Bhw].permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(latent))


def load_vq(state: Mapping[str, Tensor]) -> VqDecoder:
    """A VQ decoder with the state dict's weights and dtype; the encoder's are left out. Errors: `fill`."""
    with torch.device("meta"):
        module = VqDecoder(state)
    fill(module, state, unused=("encoder.", "quant_conv.", "quantize.codebook_used"))
    codes = F.normalize(module.get_parameter("quantize.embedding.weight"), dim=-1)
    module.register_buffer("codebook", codes, persistent=False)
    return module
