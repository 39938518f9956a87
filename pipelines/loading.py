"""Loading a pipeline from a built-in model, a local folder or the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from accel.backends import dtype_argument, quiet_torchvision, require_sound_stack
from accel.errors import AccelError, ConfigError, WeightsError

from . import folders, hub

BUILTIN, BUILTIN_AR = "builtin", "builtin-ar"
BUILTIN_TURBO, BUILTIN_TEXTURED = "builtin-turbo", "builtin-textured"
_DEVICES = ("cpu", "cuda", "mps", "xpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(model: str = BUILTIN, device: str | None = None, dtype: str | None = None) -> Any:
    """A built-in model, a local folder, or a hub id: a diffusers pipeline, or an autoregressive one. Pickled
    weights are refused.

    Args:
        model: "builtin", "builtin-turbo" (four steps), "builtin-textured" (patterned grounds), "builtin-ar", a folder or a hub
            id. What has a model_index.json is loaded by diffusers; what has only a config.json (or is LlamaGen's), as an `AutoregressivePipeline`.
        device: default: CUDA if there is one, else CPU.
        dtype: a key of `DTYPES`; default: bfloat16 on CUDA, float32 elsewhere.

    Raises:
        WeightsError: the model cannot be loaded; says why and what to do.
        UnknownNameError: an autoregressive model of a class that no adapter knows.
        ConfigError: unknown dtype, or a device that this machine or this torch does not have.
    """
    device, torch_dtype = place(device, dtype)
    require_sound_stack()
    quiet_torchvision()
    if model in (BUILTIN, BUILTIN_TURBO, BUILTIN_TEXTURED, BUILTIN_AR):
        from . import builtin

        if model == BUILTIN_AR:
            return builtin.load_autoregressive(device, torch_dtype)
        world = "textured" if model == BUILTIN_TEXTURED else "flat"
        return builtin.load_pipeline(device, torch_dtype, world, distilled=model == BUILTIN_TURBO)
    options = {} if Path(model).exists() else _on_hub(model)
    if not _is_diffusers(model, **options):
        return _autoregressive(model, torch_dtype, **options).to(device)
    if Path(model).exists():
        return folders.load(Path(model), torch_dtype).to(device)
    from diffusers import DiffusionPipeline

    try:
        pipe = DiffusionPipeline.from_pretrained(
            model, **dtype_argument(torch_dtype), use_safetensors=True, **options
        )
    except Exception as error:  # loaders of two libraries, on files that may be anything, raise anything
        raise WeightsError(
            f"{model}: cannot be loaded as a diffusers pipeline: {folders.said(error)}"
        ) from error
    return pipe.to(device)


def _autoregressive(model: str, dtype: torch.dtype, **options: Any) -> Any:
    from .autoregressive import AutoregressivePipeline

    try:
        return AutoregressivePipeline.from_pretrained(model, dtype=dtype, **options)
    except AccelError:
        raise
    except Exception as error:  # adapters read configurations that may be anything
        raise WeightsError(
            f"{model}: cannot be loaded: {folders.said(error)}. Download or save it again"
        ) from error


def place(device: str | None, dtype: str | None) -> tuple[str, torch.dtype]:
    """The device and precision that are asked for, or the defaults: see `load_pipeline`.

    Raises:
        ConfigError: unknown dtype, or a device that this machine or this torch does not have.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if device is not None:
        check_device(device)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    by_device = torch.bfloat16 if device.startswith("cuda") else torch.float32
    return device, DTYPES[dtype] if dtype else by_device


def check_device(device: str) -> None:
    """That tensors can be made there.

    Raises:
        ConfigError: not the name of a device, or not one that this machine and this torch have.
    """
    try:
        kind = torch.device(device).type
        if kind not in _DEVICES:  # "meta" would take everything and compute nothing
            raise RuntimeError(f"not one of {', '.join(_DEVICES)}")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # builds without CUDA only assert
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {device!r} cannot be used here ({reason}); cpu always works") from error


def _on_hub(model: str) -> dict[str, Any]:
    """What loaders need to know of a hub id; `WeightsError` if it is none, or cannot be had."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise WeightsError(f"{model}: there is no such folder, and hub ids are of the form owner/name")
    return hub.where(model)


def _is_diffusers(model: str, **options: Any) -> bool:
    """Whether diffusers saved it: it has a model_index.json. Raises for a folder that nobody saved."""
    from .autoregressive.loading import read_json

    folder = Path(model)
    if not folder.exists():
        return read_json(model, folders.INDEX, **options) is not None
    if folder.is_file():
        raise WeightsError(f"{folder}: is a file; give the folder that save_pretrained wrote")
    if (folder / folders.INDEX).is_file():
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
