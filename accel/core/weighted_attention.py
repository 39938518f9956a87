"""Attention in which a key weighs as many as it stands for: proportional attention (ToMe, arXiv:2210.09461, eq. 1),
softmax(q k + log size) v, without giving up the fast kernels, which take no bias.

No attention processor is copied: a mask, or the keys, come as a tensor that knows the sizes (`SizedMask`, `SizedKeys`), goes
through whatever the model does with it, and does the right thing when it reaches `scaled_dot_product_attention`. Keys in order
of size make runs of equal ones, and then there is more than one way, all equal in exact arithmetic:

- "mask": the bias as an additive mask. Everywhere; on CUDA it rules flash attention out.
- "lse": one call for each run without any bias, put together by their log-sum-exps, each plus its log(size).
- "channel": channels more in each head, 1 in the queries and log(size) in the keys.
- "flex": FlexAttention, which adds the bias inside of its kernel.

Which is fastest here is found out by running each once, at the first call in eager code.

Shapes: B batch, H heads, L queries, S keys, d channels of a head.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: (size, how many keys) in the order of the keys.
Runs = tuple[tuple[int, int], ...]


def runs(parts: Runs) -> Runs:
    """The same with empty ones left out and neighbours of one size put together."""
    found: list[tuple[int, int]] = []
    for size, count in parts:
        if found and found[-1][0] == size:
            found[-1] = (size, found[-1][1] + count)
        elif count:
            found.append((size, count))
    return tuple(found)


def bias(parts: Runs, like: Tensor) -> Tensor:
    """log(size) of every key, (S,), in the type of `like` and on its device."""
    return torch.cat([like.new_full((count,), math.log(size)) for size, count in parts])


def masked(q: Tensor, k: Tensor, v: Tensor, parts: Runs, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias(parts, q)[None, None, None], scale=scale)


def lse_merged(q: Tensor, k: Tensor, v: Tensor, parts: Runs, scale: float) -> Tensor:
    outs, sums, start = [], [], 0
    for size, count in parts:
        one = slice(start, start + count)
        out, lse_BHL = _with_lse(q, k[:, :, one], v[:, :, one], scale)
        outs.append(out)
        sums.append(lse_BHL.float() + math.log(size))
        start += count
    weight_RBHL = torch.stack(sums).softmax(0)
    merged = outs[0].float() * weight_RBHL[0, ..., None]
    for out, weight_BHL in zip(outs[1:], weight_RBHL[1:], strict=True):
        merged = torch.addcmul(merged, out.float(), weight_BHL[..., None])
    return merged.to(q.dtype)


def _with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(attention, log-sum-exp of its scores (B, H, L)) of the flash kernels that torch comes with."""
    if q.is_cuda:
        found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    else:
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    return found[0], found[1]


def channel(q: Tensor, k: Tensor, v: Tensor, parts: Runs, scale: float) -> Tensor:
    """Eight channels, so that rows stay aligned; two of them carry the bias and what its type rounds off."""
    d, wanted = q.shape[-1], bias(parts, q.new_empty((), dtype=torch.float32)) / scale
    high = wanted.to(q.dtype)
    low = (wanted - high.float()).to(q.dtype)
    keys_SE = F.pad(torch.stack([high, low], -1), (0, 6))
    ones_E = F.pad(q.new_ones(2), (0, 6))
    q = torch.cat([q, ones_E.expand(*q.shape[:-1], 8)], -1)
    k = torch.cat([k, keys_SE.expand(*k.shape[:-1], 8)], -1)
    return F.scaled_dot_product_attention(q, k, F.pad(v, (0, 8)), scale=scale)[..., :d]


def flex(q: Tensor, k: Tensor, v: Tensor, parts: Runs, scale: float) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    bias_S = bias(parts, q.new_empty((), dtype=torch.float32))

    def add(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias_S[j]

    call = _compiled_flex() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
    return call(q, k, v, score_mod=add, scale=scale)  # type: ignore[operator]


_COMPILED: list[Callable] = []


def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    if not _COMPILED:  # without it, all scores are stored
        _COMPILED.append(torch.compile(flex_attention, dynamic=False))
    return _COMPILED[0]


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor, Runs, float], Tensor]] = {
    "mask": masked,
    "lse": lse_merged,
    "channel": channel,
    "flex": flex,
}

#: (device type, dtype, channels of a head) -> the form in use.
_CHOSEN: dict[tuple[str, torch.dtype, int], str] = {}


def chosen() -> dict[tuple[str, torch.dtype, int], str]:
    """The forms in use in this process, by device type, dtype and channels of a head."""
    return dict(_CHOSEN)


class _Weighed(threading.local):
    """How often eager code of a thread has weighed keys, by form."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()


_WEIGHED = _Weighed()


def weighed() -> Counter[str]:
    """How often keys have been weighed in this thread so far, in eager code, by form."""
    return Counter(_WEIGHED.calls)


def _note(form: str) -> None:
    if not torch.compiler.is_compiling():
        _WEIGHED.calls[form] += 1


def attend(q: Tensor, k: Tensor, v: Tensor, parts: Runs, scale: float | None = None) -> Tensor:
    """softmax(scale q k + log size) v: (B, H, L, d), by the form that is fastest here.

    Args:
        parts: (size, how many keys), in the order of the keys.
        scale: default: 1 / sqrt(d).
    """
    parts, scale = runs(parts), q.shape[-1] ** -0.5 if scale is None else scale
    if len(parts) == 1:  # all weigh the same
        _note("mask")
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        _note("mask")
        return masked(q, k, v, parts, scale)  # log-sum-exps have no gradient
    key = (q.device.type, q.dtype, q.shape[-1])
    form = _CHOSEN.get(key)
    if form is None:
        if torch.compiler.is_compiling():
            return _standard(q)(q, k, v, parts, scale)
        form = _CHOSEN[key] = fastest(q, k, v, parts, scale)
    _note(form)
    return FORMS[form](q, k, v, parts, scale)


def _standard(q: Tensor) -> Callable[[Tensor, Tensor, Tensor, Runs, float], Tensor]:
    """In compiled code, where nothing can be tried out."""
    fast = (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
    )
    # Flash attention, whose log-sum-exps it takes, needs an A100 or newer.
    return lse_merged if fast and torch.cuda.get_device_capability(q.device) >= (8, 0) else masked


def fastest(q: Tensor, k: Tensor, v: Tensor, parts: Runs, scale: float) -> str:
    """The form that is fastest for these tensors, by running each; those that fail are left out. Waits for the device."""
    times: dict[str, float] = {}
    for name, form in FORMS.items():
        if name == "flex" and (not q.is_cuda or "lse" in times):
            continue  # on a CPU it stores all scores; on an H100 it costs 5-8 % of a step, "lse" 2 %, and seconds to compile
        try:
            times[name] = _seconds(lambda form=form: form(q, k, v, parts, scale), q.device)  # type: ignore[misc]
        except _FAILURES:
            if name == "mask":  # works wherever attention does
                raise
    return min(times, key=lambda name: times[name])


def working(device: str) -> dict[str, str]:
    """The forms, each with "works" or why it does not on that kind of device, by running it on a few numbers."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q = torch.ones(1, 1, 16, 64, device=device, dtype=dtype)
    found = {}
    for name, form in FORMS.items():
        found[name] = "works"
        if name == "flex" and device == "cpu":
            found[name] = "unfused on a CPU"
            continue
        try:
            form(q, q, q, ((1, 8), (4, 8)), 0.125)
        except _FAILURES as error:
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return found


#: What a kernel that is not there, or does not take these tensors, raises; torch's compiler has errors of its own.
_FAILURES = (RuntimeError, NotImplementedError, ImportError, TypeError, ValueError, AttributeError)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    best = math.inf
    for _ in range(3):
        wait()
        start = time.perf_counter()
        call()
        wait()
        best = min(best, time.perf_counter() - start)
    return best


class SizedMask(Tensor):
    """The additive mask of log(size), (..., S), as the argument that a model hands on to its attention. What is computed from
    it is a plain mask, unless that only changes its type or its other dimensions."""

    parts: Runs

    @staticmethod
    def of(mask: Tensor, parts: Runs) -> Tensor:
        sized = mask.as_subclass(SizedMask)
        sized.parts = parts
        return sized

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _with_mask(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        kept = func in _KEEPING and isinstance(args[0], SizedMask) and isinstance(out, Tensor)
        return SizedMask.of(out, args[0].parts) if kept and out.shape[-1] == _count(args[0].parts) else out


#: What attention processors do to a mask that leaves it the same along the keys.
_KEEPING = frozenset(
    getattr(Tensor, name)
    for name in ("to", "type", "expand", "unsqueeze", "view", "reshape", "contiguous", "repeat_interleave")
)


class SizedKeys(Tensor):
    """Keys of an attention that is given no mask, and whatever they are computed from: the image's rows are the first or the last
    of those that arrive, all others weigh one.

    Attributes:
        size_PK: of the image's slots.
        parts: the same as runs; empty: in no order.
        first: where the image's keys are.
    """

    size_PK: Tensor
    parts: Runs
    first: bool

    @staticmethod
    def of(x: Tensor, size_PK: Tensor, parts: Runs, first: bool) -> Tensor:
        sized = x.as_subclass(SizedKeys)
        sized.size_PK, sized.parts, sized.first = size_PK, parts, first
        return sized

    def like(self, x: Any) -> Any:
        """The same keys after a computation."""
        if isinstance(x, (tuple, list)):
            return type(x)(self.like(one) for one in x)
        return SizedKeys.of(x, self.size_PK, self.parts, self.first) if type(x) is Tensor else x

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _with_keys(*args, **kwargs)
        if func is Tensor.unflatten:
            func = _unflatten
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        if func is Tensor.__getitem__ and _without_image(args[0], args[1]):
            return out
        if isinstance(out, Tensor) or type(out) in (tuple, list):
            found = _sized_among((*args, *kwargs.values()))
            return out if found is None else found.like(out)
        return out


def _without_image(keys: Any, index: Any) -> bool:
    """Whether none of the image's rows are among those of (B, S, ...) that an index picks."""
    if not isinstance(keys, SizedKeys) or not (isinstance(index, tuple) and len(index) > 1):
        return False
    if not isinstance(index[1], slice):
        return False
    start, stop, _ = index[1].indices(keys.shape[1])
    slots, rows = keys.size_PK.shape[-1], keys.shape[1]
    return start >= slots if keys.first else stop <= rows - slots


def _unflatten(x: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """`Tensor.unflatten`, which is written in Python and which Dynamo cannot follow for a subclass (torch 2.14)."""
    dim = dim % x.ndim
    return torch.reshape(x, (*x.shape[:dim], *sizes, *x.shape[dim + 1 :]))


def _sized_among(values: Any) -> SizedKeys | None:
    for value in values:
        if isinstance(value, SizedKeys):
            return value
        if isinstance(value, (tuple, list)) and (found := _sized_among(value)) is not None:
            return found
    return None


def _count(parts: Runs) -> int:
    return sum(count for _, count in parts)


def _with_mask(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any
) -> Tensor:
    """`scaled_dot_product_attention` whose mask is a `SizedMask`."""
    with torch._C.DisableTorchFunctionSubclass():
        if _simple(args, kwargs):
            return attend(query, key, value, attn_mask.parts, kwargs.get("scale"))
        _note("mask")
        mask = bias(attn_mask.parts, query)[None, None, None]
        return F.scaled_dot_product_attention(query, key, value, mask, *args, **kwargs)


def _with_keys(
    query: Tensor, key: Any, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """`scaled_dot_product_attention` whose keys are `SizedKeys`."""
    size_PK, parts, first = key.size_PK, key.parts, key.first
    with torch._C.DisableTorchFunctionSubclass():
        others = key.shape[-2] - size_PK.shape[-1]
        if parts and attn_mask is None and _simple(args, kwargs) and query.ndim == 4:
            every = (*parts, (1, others)) if first else ((1, others), *parts)
            return attend(query, key, value, every, kwargs.get("scale"))
        _note("mask")
        log_PK = size_PK.log()
        bias_PS = F.pad(log_PK, (0, others) if first else (others, 0))[:, None, None].to(query.dtype)
        if attn_mask is not None:
            blocked = attn_mask.dtype == torch.bool
            bias_PS = bias_PS.masked_fill(~attn_mask, -math.inf) if blocked else bias_PS + attn_mask
        return F.scaled_dot_product_attention(query, key, value, bias_PS, *args, **kwargs)


def _simple(args: tuple, kwargs: dict[str, Any]) -> bool:
    """No dropout, no causal mask, no shared heads."""
    return not args and not any(kwargs.get(name) for name in ("dropout_p", "is_causal", "enable_gqa"))
