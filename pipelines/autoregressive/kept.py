"""What an autoregressive pipeline keeps between its calls: memory that rounds were captured on, and the graphs.

A CUDA graph reads weights and caches by their addresses. So prompted models stay, by what their shapes depend on,
and all of them go as soon as anything that was captured is not there any more: a parameter that was replaced or
moved, a module or a hook that came or went.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn

from accel.core.rounds import CudaGraphs, Rounds, warn_not_captured
from accel.errors import AccelWarning

from .adapter import CheckpointAdapter
from .model import PromptedModel
from .stack import Stack, merge

#: What is kept beside the last used may take this part of the device's memory.
_SHARE = 0.1
#: Whose modules read nothing from Python that changes between rounds.
_PACKAGES = ("torch", "transformers")


def graphs_by_default() -> bool:
    """Unless the environment says ACCEL_GRAPHS=0."""
    return os.environ.get("ACCEL_GRAPHS", "1") != "0"


class Kept:
    """Prompted models between calls, the last used last.

    Args:
        capture: device → what captures rounds there (`CudaGraphs.on`).
        compiler: what the functions of a `Stack` go through where rounds are captured.
        devices: types of devices on which rounds can be captured.
    """

    def __init__(
        self,
        capture: Callable[[torch.device, Callable[[str], None]], Any] = CudaGraphs.on,
        compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
        devices: tuple[str, ...] = ("cuda",),
    ) -> None:
        self._capture, self._compiler, self._devices = capture, compiler or compiled, devices
        self._models: dict[Hashable, PromptedModel] = {}
        self._known: tuple = ()
        self._failed: set[Hashable] = set()
        self.stack: Stack | None = None

    def look(self, adapter: CheckpointAdapter, graphs: bool) -> bool:
        """Drop everything if the model is not what it was, and prepare its `stack`: None if a module of the backbone
        must be called as such.

        Args:
            graphs: whether the pipeline wants them.

        Returns:
            Whether rounds are to be captured.
        """
        captures = (
            graphs
            and next(adapter.model.parameters()).device.type in self._devices
            and not hooked(adapter.model)
            and not foreign(adapter)
        )
        if self._known != (captures, _fingerprint(adapter)):
            self.clear()
            self.stack = None if hooked(adapter.backbone) else adapter.stack()
            if captures and self.stack is not None:
                merge(self.stack)
                self.stack.wrap(self._compiler)
            self._known = (captures, _fingerprint(adapter))
        return captures

    def rounds(self, device: torch.device, key: Hashable) -> Rounds:
        """Rounds that are captured; as they are, once a capture for this key has failed."""

        def fail(reason: str) -> None:
            self._failed.add(key)
            warn_not_captured(reason)

        return Rounds() if key in self._failed else Rounds(self._capture(device, fail))

    def take(self, key: Hashable) -> PromptedModel | None:
        """The model for this key, which is not kept any more: it has one user at a time."""
        return self._models.pop(key, None)

    def give(self, key: Hashable, model: PromptedModel) -> None:
        """Keep a model; of the others, the last used that there is room for."""
        self._models[key] = model
        room = (
            _SHARE * torch.cuda.get_device_properties(model.start_R.device).total_memory
            if model.start_R.is_cuda
            else 0
        )
        for old in list(self._models)[-2::-1]:
            room -= self._models[old].nbytes
            if room < 0:
                del self._models[old]

    def forget(self, decoder: Any) -> None:
        """Drop what a decoder kept, which is not attached any more."""
        for model in self._models.values():
            model.rounds.forget(decoder)

    def clear(self) -> None:
        self._models.clear()
        self._failed.clear()
        self._known, self.stack = (), None


def _fingerprint(adapter: CheckpointAdapter) -> tuple:
    """Changes when a graph of the model, or its `Stack`, is not good any more. Well under a millisecond for 1 B."""
    model: nn.Module = adapter.model
    tensors = tuple(
        # Tensors of a quantisation need not have a memory of their own.
        (part.data_ptr() if type(part) in (nn.Parameter, torch.Tensor) else id(part), part.dtype)
        for part in (*model.parameters(), *model.buffers())
    )
    return tensors, tuple(id(part) for part in model.modules()), hooked(adapter.backbone)


def foreign(adapter: CheckpointAdapter) -> bool:
    """Whether a part of the model is of another package than its family is. Such layers may be steered by Python
    values (a LoRA's scaling, whether it is on), which a captured round would keep as they were."""
    model: nn.Module = adapter.model
    known = {*_PACKAGES, _package(adapter)}
    return any(_package(part) not in known for part in model.modules())


def _package(thing: object) -> str:
    return type(thing).__module__.split(".")[0]


def hooked(module: nn.Module) -> bool:
    """Whether any part of a module must be called as such."""
    return any(_hooked(part) for part in module.modules())


def _hooked(module: nn.Module) -> bool:
    """Whether something happens at this module's calls that is not in its class."""
    own = vars(module)
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in own) or (
        own.get("_compiled_call_impl") is not None
    )


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile`, or the function as it is, with a warning, where compiling fails."""
    run = traced = torch.compile(function, fullgraph=True)

    def call(*inputs: Any) -> Any:
        nonlocal run
        if run is traced:
            try:
                return traced(*inputs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # no C compiler, an old driver, too many shapes: each its own
                warnings.warn(
                    f"a layer of the model runs uncompiled, more slowly: torch.compile failed "
                    f"({type(error).__name__}: {' '.join(str(error).split())[:200]})",
                    AccelWarning,
                    stacklevel=2,
                )
                run = function
        return run(*inputs)

    return call
