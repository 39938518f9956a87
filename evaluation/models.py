"""Find the pipeline to evaluate."""

from __future__ import annotations

import importlib
import importlib.util
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from accel import generation
from accel.errors import AccelError

from .errors import AccelWarning, EvaluationError
from .textfiles import first_line


def load_pipeline(spec: str, *, device: str | None = None, dtype: str | None = None) -> Any:
    """`builtin`, a diffusers folder, a hub id, or your own: `module:function` or `file.py:function`.

    A function of your own is called without arguments and returns the pipeline, on its device.
    """
    source, _, name = spec.rpartition(":")
    if source and name.isidentifier():
        if dtype is not None:
            warnings.warn(f"{spec} chooses its own dtype; {dtype} is ignored", AccelWarning, stacklevel=2)
        if device and device.startswith("cuda:"):
            torch.cuda.set_device(device)  # of several processes, each one's "cuda" is its own
        return _called(spec, _function(source, name))
    return generation.load_pipeline(spec, device, dtype)


def _function(source: str, name: str) -> Callable[[], Any]:
    try:
        if source.endswith(".py"):
            module_spec = importlib.util.spec_from_file_location(Path(source).stem, source)
            assert module_spec is not None
            assert module_spec.loader is not None
            module = importlib.util.module_from_spec(module_spec)
            module_spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
        function = getattr(module, name)
    except AccelError:
        raise
    # Somebody's own file may raise anything, a SyntaxError first of all.
    except Exception as error:
        raise EvaluationError(f"{source}:{name}: cannot be imported: {_said(error)}") from error
    if not callable(function):
        raise EvaluationError(
            f"{source}:{name}: a {type(function).__name__}, not a function without arguments"
        )
    return function


def _called(spec: str, function: Callable[[], Any]) -> Any:
    try:
        pipe = function()
    except AccelError:
        raise
    except Exception as error:
        raise EvaluationError(f"{spec}: made no pipeline: {_said(error)}") from error
    if not callable(pipe):
        raise EvaluationError(
            f"{spec}: returned a {type(pipe).__name__}, which cannot be called like a pipeline"
        )
    return pipe


def _said(error: Exception) -> str:
    """What it says and where in the user's own code, as far as is known."""
    if isinstance(error, FileNotFoundError):
        return f"no such file: {error.filename}"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError):
        where = f" ({error.filename}, line {error.lineno})"
        return f"SyntaxError: {error.msg}{where}"
    return f"{type(error).__name__}: {first_line(error)}{where}; accel --debug shows the way there"
