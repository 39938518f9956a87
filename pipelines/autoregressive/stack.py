"""The layers of a Llama-like transformer as functions of tensors: fewer kernels, the same numbers up to rounding.

A model family's own code is written to be read and to be trained: per layer it launches about forty kernels, and
a window of a few tokens is launched rather than computed. Here a layer is two functions with the attention between
them, `_entered` (norm, projections, rotary embedding, keys and values into the cache) and `_left` (projection,
norm, SwiGLU, both residual sums). All weights are arguments, so torch.compile sees one function for all layers:
what comes after one attention and before the next is one graph, compiled once per number of tokens that it is
told apart for, in seconds whatever the depth. Attention stays outside, as it alone depends on how far images are.

The weights are the model's own parameters. `merge` lets the ones that read the same input lie side by side, so that
they are one matrix product; the parameters become views of it, with names, shapes and values as before.

Shapes: R rows, W tokens of a window, T = R x W, D width, H query heads, G queries per key head, E width of a head,
S cached places, of which K are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(NamedTuple):
    """Weights of a layer. `qkv` and `gate_up` are one matrix or several that read the same input."""

    norm_in: Tensor
    qkv: tuple[Tensor, ...]
    out: Tensor
    norm_mid: Tensor
    gate_up: tuple[Tensor, ...]
    down: Tensor


@dataclass(frozen=True)
class Shape:
    """What is alike in all layers.

    Attributes:
        heads, kv_heads, head: H, H / G, E.
        eps: of the norms.
        interleaved: rotary pairs are neighbours (LlamaGen); else a half apart (Llama).
    """

    heads: int
    kv_heads: int
    head: int
    eps: float
    interleaved: bool = False


class Stack(nn.Module):
    """All layers and the last norm. A module, so that it can be timed like one; it owns no parameters.

    Args:
        layers: their weights, alike in shape.
        norm: the last norm's.
    """

    def __init__(self, shape: Shape, layers: Sequence[Layer], norm: Tensor) -> None:
        super().__init__()
        self.shape, self.layers = shape, list(layers)
        self._norm = (norm,)  # in a tuple, not registered: it is the model's
        self._begin, self._between, self._end = _entered, _between, _end

    def wrap(self, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Put the functions between attentions through something, such as torch.compile."""
        self._begin, self._between, self._end = (_any_length(wrapper(f)) for f in (_entered, _between, _end))

    def forward(
        self, x_RWD: Tensor, bias_R1WK: Tensor, cos_RWE: Tensor, sin_RWE: Tensor, cache: Any
    ) -> Tensor:
        """Normalised last hidden states (R, W, D).

        Args:
            bias_R1WK: added to the attention scores.
            cos_RWE, sin_RWE: rotary tables, of E / 2 columns if interleaved.
            cache: a `PlacedCache` that has been aimed.
        """
        rows, width = x_RWD.shape[:2]
        shape, grouped = self.shape, self.shape.heads // self.shape.kv_heads
        x_TD = x_RWD.flatten(0, 1)
        cos, sin = _signed(cos_RWE.flatten(0, 1), sin_RWE.flatten(0, 1), shape.interleaved)
        bias = bias_R1WK.repeat(1, 1, grouped, 1) if grouped > 1 else bias_R1WK
        turned = (cos, sin, cache.index, shape)
        keys, values = cache.memory(0, shape.kv_heads, shape.head, x_TD)
        q_THE = self._begin(x_TD, self.layers[0], keys, values, *turned)
        for number, layer in enumerate(self.layers):
            attended_TD = _attend(q_THE, keys, values, bias, rows, width)
            if number + 1 == len(self.layers):
                return self._end(x_TD, attended_TD, layer, self._norm[0], shape).unflatten(0, (rows, width))
            keys, values = cache.memory(number + 1, shape.kv_heads, shape.head, x_TD)
            x_TD, q_THE = self._between(
                x_TD, attended_TD, layer, self.layers[number + 1], keys, values, *turned
            )
        raise AssertionError("a transformer without layers")


def _any_length(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for any number of tokens and places at once, not for the first and then again for the others."""

    def call(*inputs: Any) -> Any:
        for one in inputs:
            if (
                isinstance(one, Tensor)
                and not isinstance(one, nn.Parameter)
                and not torch.compiler.is_compiling()
            ):
                torch._dynamo.maybe_mark_dynamic(one, 0)
        return function(*inputs)

    return call


def _between(x_TD, attended_TD, layer, following, keys, values, cos, sin, index, shape):
    x_TD = _left(x_TD, attended_TD, layer, shape)
    return x_TD, _entered(x_TD, following, keys, values, cos, sin, index, shape)


def _end(x_TD, attended_TD, layer, norm, shape):
    return F.rms_norm(_left(x_TD, attended_TD, layer, shape), norm.shape, norm, shape.eps)


def _entered(
    x_TD: Tensor,
    layer: Layer,
    keys_NHE: Tensor,
    values_NHE: Tensor,
    cos_TE: Tensor,
    sin_TE: Tensor,
    index_T: Tensor,
    shape: Shape,
) -> Tensor:
    """Queries (T, H, E); keys and values are written to rows `index_T` of the cache."""
    x_TD = F.rms_norm(x_TD, layer.norm_in.shape, layer.norm_in, shape.eps)
    sizes = [heads * shape.head for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
    q, k, v = (part.unflatten(-1, (-1, shape.head)) for part in _linear(x_TD, layer.qkv, sizes))
    keys_NHE.index_copy_(0, index_T, _turn(k, cos_TE, sin_TE, shape.interleaved))
    values_NHE.index_copy_(0, index_T, v)
    return _turn(q, cos_TE, sin_TE, shape.interleaved)


def _left(x_TD: Tensor, attended_TD: Tensor, layer: Layer, shape: Shape) -> Tensor:
    """Hidden states after a layer, from what its attention gave."""
    x_TD = x_TD + F.linear(attended_TD, layer.out)
    y_TD = F.rms_norm(x_TD, layer.norm_mid.shape, layer.norm_mid, shape.eps)
    gate, up = _linear(y_TD, layer.gate_up, [layer.down.shape[1]] * 2)
    return x_TD + F.linear(F.silu(gate) * up, layer.down)


def _linear(x_TD: Tensor, weights: tuple[Tensor, ...], sizes: list[int]) -> Sequence[Tensor]:
    """What each of several matrices gives, which may be one below the other in a single one, of these heights."""
    if len(weights) == 1:
        return F.linear(x_TD, weights[0]).split(sizes, -1)
    return [F.linear(x_TD, weight) for weight in weights]


def _turn(x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor, interleaved: bool) -> Tensor:
    """Turn pairs of channels; `_signed` has made the tables. A flip is an index to a compiler, a concatenation a kernel."""
    pairs, side = ((-1, 2), -1) if interleaved else ((2, -1), -2)
    others_THE = x_THE.unflatten(-1, pairs).flip(side).flatten(-2)
    return (x_THE * cos_TE[:, None] + others_THE * sin_TE[:, None]).type_as(x_THE)


def _signed(cos_TE: Tensor, sin_TE: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """A number per channel, and the sine negative for the first of a pair."""
    if interleaved:
        return cos_TE[..., None].expand(-1, -1, 2).flatten(1), torch.stack([-sin_TE, sin_TE], -1).flatten(1)
    first, second = sin_TE.chunk(2, -1)
    return cos_TE, torch.cat([-first, second], -1)


def _attend(
    q_THE: Tensor, keys_NHE: Tensor, values_NHE: Tensor, bias: Tensor, rows: int, width: int
) -> Tensor:
    """(T, H x E). The queries that share a key head stand side by side, as more queries: no key is repeated."""
    kv_heads, head = keys_NHE.shape[1:]
    seen = bias.shape[-1]
    q = q_THE.view(rows, width, kv_heads, -1, head).permute(0, 2, 3, 1, 4).flatten(2, 3)
    k, v = (memory.unflatten(0, (rows, -1))[:, :seen].transpose(1, 2) for memory in (keys_NHE, values_NHE))
    y = F.scaled_dot_product_attention(q, k, v, bias)
    return y.unflatten(2, (-1, width)).permute(0, 3, 1, 2, 4).reshape(rows * width, -1)


#: Class names whose layers are Llama's: names of parts, order of operations, and nothing else.
_LLAMAS = ("LlamaModel", "Emu3TextModel")


def llama(backbone: nn.Module) -> Stack | None:
    """The stack of a transformers Llama; None if it is not one, or not plain: biases, other activations, linear layers
    that an adapter or a quantisation has replaced."""
    config: Any = getattr(backbone, "config", None)
    if type(backbone).__name__ not in _LLAMAS or config.hidden_act != "silu":
        return None
    layers = []
    for part in backbone.get_submodule("layers").children():
        attention, mlp = part.get_submodule("self_attn"), part.get_submodule("mlp")
        names = [f"{name}_proj" for name in ("q", "k", "v", "o")]
        linear = [attention.get_submodule(name) for name in names]
        linear += [mlp.get_submodule(f"{name}_proj") for name in ("gate", "up", "down")]
        weights = plain_weights(linear)
        if weights is None:
            return None
        q, k, v, out, gate, up, down = weights
        norms = [
            part.get_parameter(f"{name}.weight") for name in ("input_layernorm", "post_attention_layernorm")
        ]
        layers.append(Layer(norms[0], (q, k, v), out, norms[1], (gate, up), down))
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = Shape(config.num_attention_heads, config.num_key_value_heads, head, config.rms_norm_eps)
    return Stack(shape, layers, backbone.get_parameter("norm.weight"))


def plain_weights(linear: Sequence[nn.Module]) -> list[nn.Parameter] | None:
    """The weights of linear layers; None if they do not say all that one of them does: a bias, a class that an adapter
    or a quantisation put there, or a quantisation's own tensors."""
    if not all(type(one) is nn.Linear and one.bias is None for one in linear):
        return None
    if not all(type(one.weight) is nn.Parameter for one in linear):
        return None
    return [one.get_parameter("weight") for one in linear]


def merge(stack: Stack) -> None:
    """Let weights that read the same input lie side by side; the parameters become views of that memory.

    Needs one group's memory more while it runs, and none after it.
    """
    stack.layers = [
        layer._replace(qkv=_side_by_side(layer.qkv), gate_up=_side_by_side(layer.gate_up))
        for layer in stack.layers
    ]


def _side_by_side(weights: tuple[Tensor, ...]) -> tuple[Tensor]:
    first, sizes = weights[0], [len(weight) for weight in weights]
    whole = (
        first.detach().as_strided((sum(sizes), first.shape[1]), (first.shape[1], 1))
        if _adjacent(weights)
        else None
    )
    if whole is None:
        whole = torch.cat([weight.detach() for weight in weights])
        for weight, part in zip(weights, whole.split(sizes), strict=True):
            weight.data = part
    return (whole,)


def _adjacent(weights: tuple[Tensor, ...]) -> bool:
    """Whether they already are parts of one matrix, one after the other."""
    at = weights[0].data_ptr()
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == weights[0].untyped_storage().data_ptr()
        if not same or not weight.is_contiguous() or weight.data_ptr() != at:
            return False
        at += weight.nbytes
    return True
