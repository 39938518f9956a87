"""Low-rank changes of a frozen model's linear layers, trained without touching the model. Used by the fine-tuning scripts.

The changed weights W + B A are formed once a step and put in by `torch.func.functional_call`, so that activations see
one matrix product per layer, as at inference, and one frozen model serves as teacher and student.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class LowRank(nn.Module):
    """A (r, in) and B (out, r) for every linear layer of `model`, and an addition to its bias.

    Args:
        rank: path of a layer -> its rank; 0: it stays as it is.
    """

    def __init__(self, model: nn.Module, rank: Callable[[str], int], biases: bool = True):
        super().__init__()
        self.tensors = nn.ParameterDict()
        self.keys: dict[str, str] = {}  # ParameterDict takes no dots
        for path, module in model.named_modules():
            if not isinstance(module, nn.Linear) or not rank(path):
                continue
            r, device = min(rank(path), *module.weight.shape), module.weight.device
            a = torch.empty(r, module.in_features, device=device)
            nn.init.kaiming_uniform_(a, math.sqrt(5))
            self._add(f"{path}.A", a)
            self._add(f"{path}.B", torch.zeros(module.out_features, r, device=device))
            if biases and module.bias is not None:
                self._add(f"{path}.bias", torch.zeros_like(module.bias, dtype=torch.float32))

    def _add(self, name: str, value: Tensor) -> None:
        key = name.replace(".", "|")
        self.keys[name] = key
        self.tensors[key] = nn.Parameter(value)

    def named(self) -> dict[str, Tensor]:
        """The tensors by the names that side-cars give them."""
        return {name: self.tensors[key] for name, key in self.keys.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Changes of at most these ranks, by the names that side-cars give them."""
        for name, tensor in self.named().items():
            value = tensors[name]
            if name.endswith(".B"):
                tensor.zero_()[:, : value.shape[1]] = value
            else:
                tensor[: len(value)] = value

    def changed(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`base` (parameters by name) with these layers changed."""
        named = self.named()
        weights = dict(base)
        for name in named:
            path, _, part = name.rpartition(".")
            if part == "A":
                weight = base[f"{path}.weight"]
                weights[f"{path}.weight"] = weight + (named[f"{path}.B"] @ named[name]).to(weight.dtype)
            elif part == "bias":
                weights[name] = base[name] + named[name].to(base[name].dtype)
        return weights


@torch.no_grad()
def truncated(named: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The same changes at this rank at most, as near as any of it (Eckart and Young 1936)."""
    kept = dict(named)
    for path in [name.removesuffix(".A") for name in named if name.endswith(".A")]:
        a, b = (named[f"{path}.{part}"].float() for part in "AB")
        left, size, right = torch.linalg.svd(b @ a, full_matrices=False)
        r = min(rank, len(a))
        root = size[:r].sqrt()
        kept[f"{path}.A"], kept[f"{path}.B"] = root[:, None] * right[:r], left[:, :r] * root
    return kept


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def velocity(model: nn.Module, weights: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> Tensor:
    """A FLUX transformer's prediction with these weights, in float32."""
    return functional_call(model, dict(weights), (), dict(inputs))[0].float()


def exact_times(model: nn.Module) -> Callable[[Tensor], None]:
    """FLUX scales times to 0..1000 in the activations' precision, and bfloat16 has steps of 4 there, so that a model
    run in bfloat16 is told another time than the one its noise has. The returned function sets the true ones."""
    true: list[Tensor] = []

    def replace(module: nn.Module, args: tuple) -> tuple:
        return (true[0] * 1000, *args[1:])

    model.time_text_embed.register_forward_pre_hook(replace)

    def set_times(times: Tensor) -> None:
        true[:] = [times]

    return set_times


def safe_backends(plain: bool) -> torch.dtype | None:
    """Which attention a GPU trains with, and the model's precision (None: the device's usual one).

    cuDNN's attention is left out: a first try on an H100 (torch 2.11) ended in its backward pass or next to it. `plain`
    leaves out all fused ones and bfloat16 as well.
    """
    if not plain:
        if torch.cuda.is_available():
            torch.backends.cuda.enable_cudnn_sdp(False)
        return None
    torch.backends.cuda.matmul.allow_tf32 = True
    nn.functional.scaled_dot_product_attention = two_matmuls
    return torch.float32


def two_matmuls(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **rest):
    """Attention without a fused kernel: (B, H, L, d) each, a mask that is added to the logits."""
    logits = (query @ key.transpose(-1, -2)) * (scale or query.shape[-1] ** -0.5)
    if attn_mask is not None:
        logits = logits + attn_mask
    return logits.softmax(-1) @ value
