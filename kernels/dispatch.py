"""Which implementation of an operation runs: Triton's kernel on CUDA, the reference everywhere else.

A kernel proves itself: the first call of each kind (types, sizes up to a factor of two) is also computed by the
reference, and a kernel that raises or says something else is not used for that kind, with a warning. Nothing can be
proven while a CUDA graph is captured: there runs what was proven before, else the reference.

In compiled code an operation is one node (`torch.ops.accel.<name>`), or its reference, where inductor fuses that with
what stands around it (`fuses`).
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from accel import backends
from accel.errors import AccelWarning, ConfigError, NumericsError, UnsupportedError

MODES = ("auto", "triton", "reference")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
#: Largest error a kernel may have, relative to the largest value. References round between operations, kernels once.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}

#: Triton's interpreter runs kernels on the CPU; what it finds are wrong indices, masks and tails.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_library = torch.library.Library("accel", "FRAGMENT")
OPS: dict[str, Op] = {}


def _mode_of(text: str) -> str:
    if text not in MODES:
        raise ConfigError(f"kernels {text!r}: expected one of {', '.join(MODES)}")
    return text


def _missing() -> str | None:
    """Why kernels cannot run here; None: they can."""
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    probe = backends.triton()
    return None if probe.active else f"Triton {probe.detail}"


MISSING = _missing()
_mode, _check = "auto", False


class use:
    """Choose the implementation of all operations, from now on or for the length of a `with`.

    Args:
        mode: "auto": kernels where they run and are right. "triton": the same, and an error where they cannot or
            are not. "reference": plain torch operations.
        check: look at every index before it is used (debugging: waits for the device at every call).

    Raises:
        ConfigError: another mode.
        UnsupportedError: "triton" where no kernel can run.
    """

    def __init__(self, mode: str, *, check: bool = False) -> None:
        global _mode, _check
        if _mode_of(mode) == "triton" and MISSING is not None:
            raise UnsupportedError(f"Triton's kernels cannot run here: {MISSING}. Use 'auto' or 'reference'.")
        self._before = _mode, _check
        _mode, _check = mode, check

    def __enter__(self) -> use:
        return self

    def __exit__(self, *exc: object) -> None:
        global _mode, _check
        _mode, _check = self._before


use(os.environ.get("ACCEL_KERNELS", "auto"))


def status() -> tuple[bool, str]:
    """(whether kernels run, which mode and why in one line)."""
    if _mode == "reference":
        return False, "references run: asked for by accel.kernels.use or ACCEL_KERNELS"
    if MISSING is not None:
        return False, f"references run: {MISSING}"
    failed = [f"{op.name}: {why}" for op in OPS.values() for why in op.verdicts.values() if why]
    return True, f"mode {_mode!r}; " + (
        "; ".join(failed) or "each kernel is checked against its reference at its first call"
    )


class Op:
    """An operation with a reference and, in the module `triton` beside it, a kernel of the same name and arguments.

    Args:
        name: of the operation and of both functions.
        schema: of its arguments and results, in `torch.library`'s form.
        reference: the ground truth, of plain torch operations.
        suits: whether the kernel takes these arguments; what it does not take is the reference's.
        agrees: (arguments, kernel's result, reference's) -> what is wrong with the kernel's; None: nothing.
        indices: (arguments) -> (indices, lowest valid, number of rows) of each table, for `use(check=True)`.
        fuses: compiled code takes the reference, which inductor makes one kernel of.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        reference: Callable[..., Any],
        *,
        suits: Callable[..., bool] = lambda *args: True,
        agrees: Callable[[Sequence[Any], Any, Any], str | None] | None = None,
        indices: Callable[..., list[tuple[Tensor, int, int]]] = lambda *args: [],
        fuses: bool = False,
    ) -> None:
        self.name, self.reference, self.fuses = name, reference, fuses
        self.suits, self.indices = suits, indices
        self.agrees = agrees or (lambda args, found, truth: close(found, truth))
        self.verdicts: dict[tuple, str | None] = {}
        self._kinds: dict[tuple, tuple] = {}  # by sizes as they are
        self._home = reference.__module__.rpartition(".")[0]
        _library.define(name + schema)
        _library.impl(name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"accel::{name}", reference, lib=_library)
        self.node = getattr(torch.ops.accel, name).default
        OPS[name] = self

    def __call__(self, *args: Any) -> Any:
        if _check and not torch.compiler.is_compiling():
            self._check_indices(args)
        return self.node(*args) if self._fast(args) else self.reference(*args)

    def _fast(self, args: tuple[Any, ...]) -> bool:
        """May be traced: reads flags and what is known of tensors without their values."""
        if MISSING is not None or _mode == "reference":
            return False
        if self.fuses and torch.compiler.is_compiling():
            return False
        tensors = _tensors(args)
        if not (INTERPRETED or all(t.is_cuda for t in tensors)):
            return False
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return False  # kernels have no backward
        return all(t.numel() > 0 for t in tensors) and self.suits(*args)

    @cached_property
    def kernel(self) -> Callable[..., Any]:
        return getattr(importlib.import_module(f"{self._home}.triton"), self.name)

    def _run(self, *args: Any) -> Any:
        tensors = _tensors(args)
        sizes = (tensors[0].device, *[t.dtype for t in tensors], *[t.shape for t in tensors])
        kind = self._kinds.get(sizes)
        if kind is None:
            kind = (tensors[0].device, *((t.dtype, *_size_class(t)) for t in tensors))
            self._kinds[sizes] = kind
        if tensors[0].is_cuda and tensors[0].device.index != torch.cuda.current_device():
            with torch.cuda.device(tensors[0].device):
                return self._chosen(kind, args)
        return self._chosen(kind, args)

    def _chosen(self, kind: tuple, args: tuple[Any, ...]) -> Any:
        if kind not in self.verdicts:
            if not INTERPRETED and torch.cuda.is_current_stream_capturing():
                return self.reference(*args)
            self.verdicts[kind] = self._prove(args)
        return self.reference(*args) if self.verdicts[kind] else self._launch(*args)

    def _launch(self, *args: Any) -> Any:
        return self.kernel(*map(_contiguous, args))

    def check(self, args: tuple[Any, ...]) -> str | None:
        """What is wrong with the kernel's result for these arguments; None: it is the reference's."""
        return self.agrees(args, self._launch(*args), self.reference(*args))

    def _prove(self, args: tuple[Any, ...]) -> str | None:
        """Why the kernel is not to be used for arguments like these; None: it said what the reference says."""
        try:
            why = self.check(args)
        except Exception as error:  # whatever a compiler or a driver raises
            why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if why:
            say = f"the kernel {self.name!r} is not used for arguments like these, its reference runs instead: {why}"
            if _mode == "triton":
                raise NumericsError(f"{say}. accel.kernels.use('auto') goes on without it.")
            warnings.warn(say, AccelWarning, stacklevel=2)
        return why

    def _check_indices(self, args: tuple[Any, ...]) -> None:
        for index, lowest, rows in self.indices(*args):
            low, high = (int(v) for v in index.aminmax())
            if low < lowest or high >= rows:
                raise ConfigError(
                    f"{self.name}: indices from {low} to {high} where {lowest} to {rows - 1} are valid"
                )


def close(found: Any, truth: Any) -> str | None:
    """What differs between two results, beyond rounding; whole numbers must be equal."""
    if isinstance(truth, (tuple, list)):
        differences = (close(f, t) for f, t in zip(found, truth, strict=True))
        return next((d for d in differences if d), None)
    if found.shape != truth.shape or found.dtype != truth.dtype:
        return f"{found.dtype} {tuple(found.shape)} instead of {truth.dtype} {tuple(truth.shape)}"
    if not truth.is_floating_point():
        wrong = int((found != truth).sum())
        return f"{wrong} of {truth.numel()} whole numbers differ" if wrong else None
    a, b = found.float(), truth.float()
    finite = b.isfinite()
    if not torch.equal(finite, a.isfinite()):
        return "infinities or NaNs at other places"
    a, b = torch.where(finite, a, 0.0), torch.where(finite, b, 0.0)
    worst, scale = float((a - b).abs().max()), float(b.abs().max())
    return (
        None
        if worst <= TOLERANCES[truth.dtype] * scale
        else f"off by {worst:.2g} at values up to {scale:.2g}"
    )


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for a in args:
        if isinstance(a, Tensor):
            found.append(a)
        elif isinstance(a, (list, tuple)):
            found.extend(a)
    return found


def _contiguous(a: Any) -> Any:
    if isinstance(a, Tensor):
        return a.contiguous()
    return [_contiguous(item) for item in a] if isinstance(a, (list, tuple)) else a


def _size_class(x: Tensor) -> tuple[int, ...]:
    """Sizes up to a factor of two; channels, which kernels are compiled for, as they are."""
    return (*(n.bit_length() for n in x.shape[:-1]), *x.shape[-1:])
