"""Find the pipeline to evaluate."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

from accel.evaluation.errors import EvaluationError


def load_pipeline(
    spec: str, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> Any:
    """`builtin`, a diffusers folder, a hub id, or your own: `module:function` or `file.py:function`.

    A function of your own is called without arguments and returns the pipeline, on its device.
    """
    if spec == "builtin":
        from accel.pipelines import builtin

        return builtin.load_pipeline(device=device, dtype=dtype)
    source, _, name = spec.rpartition(":")
    if source and name.isidentifier():
        return _function(source, name)()
    from diffusers import DiffusionPipeline

    try:
        pipe = DiffusionPipeline.from_pretrained(spec, torch_dtype=dtype)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{spec}: not a diffusers pipeline that can be loaded: {error}") from error
    return pipe.to(device) if device is not None else pipe


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
