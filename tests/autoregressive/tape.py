"""What a CUDA graph does, on the CPU: the operators of a run, with their tensors and numbers, and nothing else, again.

A tensor that was there before the recording is read and written where it is. One that was made in it is made again.
Whatever Python decided or counted while recording stays as it was: a round that depends on it gives wrong tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, out))  # keeps all alive, so that ids stay unique
        return out


def capture(body: Callable[[], None]) -> Callable[[], None]:
    """Record a body and return what replays it. Unlike a CUDA graph's, the recording itself is a run: undone."""
    tape = _Tape()
    before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    class Outside(TorchDispatchMode):
        """Copies whatever is about to be written, to put it back."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.is_mutable:
                flat, _ = tree_flatten((args, kwargs))
                for one in flat:
                    if isinstance(one, torch.Tensor):
                        storage = one.untyped_storage()
                        if storage.data_ptr() not in before:
                            whole = one.new_empty(0).set_(storage, 0, (storage.nbytes() // one.itemsize,))
                            before[storage.data_ptr()] = whole, whole.clone()
            return func(*args, **(kwargs or {}))

    with Outside(), tape:
        body()
    for whole, copy in before.values():
        whole.copy_(copy)

    def replay() -> None:
        made: dict[int, torch.Tensor] = {}

        def now(value: Any) -> Any:
            return made.get(id(value), value) if isinstance(value, torch.Tensor) else value

        for func, args, kwargs, out in tape.steps:
            new = func(*tree_map(now, args), **tree_map(now, kwargs))
            for old, fresh in zip(tree_flatten(out)[0], tree_flatten(new)[0], strict=True):
                if isinstance(old, torch.Tensor):
                    made[id(old)] = fresh

    replay.operators = len(tape.steps)  # type: ignore[attr-defined]
    return replay
