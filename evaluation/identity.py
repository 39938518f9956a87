"""What decides a pipeline's images besides its call: recorded at the first start, compared at every other.

The weights are known by a hash of their content, not by their path: a new checkpoint under the old name is
another model. Hashed are, of every parameter and buffer of the pipeline's modules: name, shape, dtype, 64 KiB of
evenly spaced elements (small tensors whole), and the sum of all bytes as 64-bit integers, which is the same on any
device. Any one element that changes is seen; the weights are read once, at memory speed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from accel.core.capability import scheduler_of

_SAMPLE = 1 << 16  # bytes of a tensor


def identity(pipe: Any) -> dict[str, Any]:
    """Class, dtype, kind of device, scheduler and hash of the weights, as plain data.

    `model_weights` is None if the pipeline shows no modules (a function of one's own around something else).
    """
    return {
        "pipeline": type(pipe).__name__,
        "dtype": dtype(pipe),
        "device": _device(pipe),
        "scheduler": _scheduler(scheduler_of(pipe)),
        "model_weights": weights_hash(modules(pipe)),
    }


def dtype(pipe: Any) -> str | None:
    """The pipeline's dtype as text, if it has one."""
    found = getattr(pipe, "dtype", None)
    return None if found is None else str(found).removeprefix("torch.")


def modules(pipe: Any) -> dict[str, nn.Module]:
    """The modules that a pipeline holds, by name, and those of what it holds: an autoregressive pipeline's
    adapter, the diffusers pipeline in a class of one's own."""
    found: dict[str, nn.Module] = {}
    for name, part in getattr(pipe, "__dict__", {}).items():
        if isinstance(part, nn.Module):
            found[name] = part
        elif not isinstance(part, (type, ModuleType)):
            inner = getattr(part, "__dict__", {}).items()
            found |= {f"{name}.{sub}": module for sub, module in inner if isinstance(module, nn.Module)}
    return dict(sorted(found.items()))


def weights_hash(parts: dict[str, nn.Module]) -> str | None:
    """16 hex digits over the modules' tensors; None if there are none.

    Compiling does not change it. Tensors whose values are elsewhere (sequential offload keeps them on "meta")
    enter with name, shape and dtype only.
    """
    digest, count = hashlib.sha256(), 0
    for part, module in parts.items():
        for name, tensor in _tensors(module):
            shape = f"{part}.{name} {tuple(tensor.shape)} {tensor.dtype}\n"
            digest.update(shape.encode())
            digest.update(_values(tensor))
            count += 1
    return digest.hexdigest()[:16] if count else None


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    named = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in sorted(named, key=lambda item: item[0]):
        yield from _plain_tensors(name.replace("_orig_mod.", ""), tensor.detach())


def _plain_tensors(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A quantised tensor is a wrapper around others, which can be read."""
    if hasattr(tensor, "__tensor_flatten__"):
        for inner in tensor.__tensor_flatten__()[0]:
            yield from _plain_tensors(f"{name}.{inner}", getattr(tensor, inner))
    else:
        yield name, tensor


def _values(tensor: torch.Tensor) -> bytes:
    if tensor.is_meta or not tensor.numel():
        return b""
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
    stride = -(-flat.numel() * flat.element_size() // _SAMPLE)
    sample = flat[::stride].cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return sample + _sum(flat.view(torch.uint8)).to_bytes(8, "little")


def _sum(content: torch.Tensor) -> int:
    """Sum of bytes (N,) taken as 64-bit integers, modulo 2^64."""
    whole, rest = content[: len(content) // 8 * 8], content[len(content) // 8 * 8 :]
    # NumPy adds integers at memory speed, torch on a CPU at a hundredth of it.
    total = _numpy_sum(whole) if content.device.type == "cpu" else _torch_sum(whole)
    return (total + int.from_bytes(rest.cpu().numpy().tobytes(), "little")) % (1 << 64)


def _numpy_sum(whole: torch.Tensor) -> int:
    return int(whole.numpy().view(np.uint64).sum(dtype=np.uint64))


def _torch_sum(whole: torch.Tensor) -> int:
    words = whole if whole.storage_offset() % 8 == 0 else whole.clone()  # a view needs its places aligned
    return int(words.view(torch.int64).sum()) % (1 << 64)


def _device(pipe: Any) -> str | None:
    """cpu, cuda, mps: where it computes. With offload, diffusers' `device` says where the weights wait."""
    found = getattr(pipe, "_execution_device", None) or getattr(pipe, "device", None)
    return None if found is None else torch.device(found).type


def _scheduler(scheduler: Any) -> dict[str, Any] | None:
    """Class and settings; names that begin with an underscore are diffusers' own notes."""
    if scheduler is None:
        return None
    config = getattr(scheduler, "config", None) or {}
    settings = {name: value for name, value in dict(config).items() if not name.startswith("_")}
    return {"class": type(scheduler).__name__, **json.loads(json.dumps(settings, default=str))}
