"""CUDA graphs played on the CPU: operations are written down with the tensors they read and made, and replayed on those.

As on a GPU, a replay runs no Python of the model, reads and writes the recorded places alone, and whatever else lay in
the memory of the graphs is gone: everything recorded is poisoned before each replay.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SYNCS = {"_local_scalar_dense", "nonzero", "_unique2", "equal"}


class Tape(TorchDispatchMode):
    """A recorder in the form of `accel.core.graphs.Recorder`."""

    def __init__(self, host=1.0, device=1.0):
        super().__init__()
        self.entries, self.made = None, []  # of the recording; all tensors of all recordings
        self.records = self.replays = 0
        self.host, self.device = host, device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.split("::")[1] in SYNCS:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        aliases = any(r.alias_info is not None for r in func._schema.returns)
        self.entries.append((func, args, kwargs or {}, out, aliases))
        return out

    def record(self, call):
        self.records += 1
        self.entries = entries = []
        with self:
            output = call()
        self.made += [t for *_, out, aliases in entries if not aliases for t in _tensors(out)]

        def replay():
            self.replays += 1
            for tensor in self.made:
                _poison(tensor)
            for func, args, kwargs, out, aliases in entries:
                again = func(*args, **kwargs)
                if not aliases:
                    for old, new in zip(_tensors(out), _tensors(again), strict=True):
                        old.copy_(new)

        for tensor in self.made:  # recording computes nothing
            _poison(tensor)
        return replay, output

    def timed(self, call):
        return call(), self.host, self.device


def _tensors(value):
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _poison(tensor):
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    elif tensor.dtype is torch.int64:  # indices out of range are an error
        tensor.fill_(-(2**40))
