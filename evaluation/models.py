"""Find the pipeline to evaluate."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch

from accel import generation

from .errors import AccelWarning, EvaluationError


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
        return _function(source, name)()
    return generation.load_pipeline(spec, device, dtype)


def _function(source: str, name: str) -> Any:
    try:
        if source.endswith(".py"):
            module_spec = importlib.util.spec_from_file_location(Path(source).stem, source)
            assert module_spec is not None
            assert module_spec.loader is not None
            module = importlib.util.module_from_spec(module_spec)
            module_spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
        return getattr(module, name)
    except (ImportError, FileNotFoundError, AttributeError) as error:
        raise EvaluationError(f"{source}:{name}: cannot be imported: {error}") from error
