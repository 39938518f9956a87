"""Loading a pipeline from a built-in model, a local folder or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from accel.backends import dtype_argument, require_sound_stack
from accel.errors import ConfigError, WeightsError

BUILTIN, BUILTIN_AR = "builtin", "builtin-ar"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(model: str = BUILTIN, device: str | None = None, dtype: str | None = None) -> Any:
    """A built-in model, a local folder, or a hub id: a diffusers pipeline, or an autoregressive one. Pickled
    weights are refused.

    Args:
        model: "builtin", "builtin-ar", a folder or a hub id. What has a model_index.json is loaded by diffusers;
            what has only a config.json (or is LlamaGen's), as an `AutoregressivePipeline`.
        device: default: CUDA if there is one, else CPU.
        dtype: a key of `DTYPES`; default: bfloat16 on CUDA, float32 elsewhere.

    Raises:
        WeightsError: the model cannot be loaded; says why and what to do.
        UnknownNameError: an autoregressive model of a class that no adapter knows.
        ConfigError: unknown dtype, or a device that this machine or this torch does not have.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if device is not None:
        _check(device)
    require_sound_stack()
    if model in (BUILTIN, BUILTIN_AR):
        from . import builtin

        load = builtin.load_pipeline if model == BUILTIN else builtin.load_autoregressive
        return load(device, DTYPES[dtype] if dtype else None)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch_dtype = DTYPES[dtype] if dtype else (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    folder = Path(model)
    if not _is_diffusers(model):
        from .autoregressive import AutoregressivePipeline

        return AutoregressivePipeline.from_pretrained(model, dtype=torch_dtype).to(device)
    from diffusers import DiffusionPipeline

    if folder.exists() and _only_pickles(folder):
        raise WeightsError(
            f"{folder}: its weights are pickles (.bin/.pt/.ckpt), which can run any code when loaded and are "
            "refused. Convert them to safetensors: pipe.save_pretrained(folder, safe_serialization=True)"
        )
    try:
        pipe = DiffusionPipeline.from_pretrained(model, **dtype_argument(torch_dtype), use_safetensors=True)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{model}: cannot be loaded as a diffusers pipeline: {error}") from error
    return pipe.to(device)


def _check(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # builds without CUDA only assert
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {device!r} cannot be used here ({reason}); cpu always works") from error


def _is_diffusers(model: str) -> bool:
    """Whether diffusers saved it: it has a model_index.json. Raises for a folder that nobody saved."""
    from .autoregressive.loading import read_json

    folder = Path(model)
    if not folder.exists():
        if model.startswith((".", "/", "~")) or model.count("/") != 1:  # no hub id looks like that
            raise WeightsError(f"{model}: there is no such folder, and hub ids are of the form owner/name")
        return read_json(model, "model_index.json") is not None
    if (folder / "model_index.json").is_file():
        return True
    if not (folder / "config.json").is_file() and not any(folder.glob("[ct]2i_*")):
        raise WeightsError(
            f"{folder}: neither a diffusers pipeline folder (it has no model_index.json) nor that of an "
            "autoregressive model (it has no config.json)"
        )
    return False


def is_autoregressive(pipe: Any) -> bool:
    """Whether it makes images token by token."""
    from .autoregressive import AutoregressivePipeline

    return isinstance(pipe, AutoregressivePipeline)


def _only_pickles(folder: Path) -> bool:
    has = {suffix: any(folder.rglob(f"*{suffix}")) for suffix in (".safetensors", ".bin", ".pt", ".ckpt")}
    return not has.pop(".safetensors") and any(has.values())
