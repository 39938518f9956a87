"""Which optional parts of the stack work here, found out by importing them: a version number in a package
list does not say whether the thing loads."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import warnings
from dataclasses import asdict, dataclass
from typing import Any

from .errors import UnsupportedError


@dataclass(frozen=True)
class Probe:
    """One optional part: whether it works, its version, and if it does not, why and what to do."""

    name: str
    active: bool
    version: str | None
    detail: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _import(module: str) -> str | None:
    """None if it imports, else the error in one line. Any error counts: a broken build raises anything."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return None


def _optional(name: str, package: str, module: str, use: str) -> Probe:
    version = _version(package)
    install = f"pip install {package}"
    if version is None:
        return Probe(name, False, None, f"not installed; {use}. To get it: {install}")
    error = _import(module)
    if error:
        advice = f"Try: {install.replace('install', 'install --upgrade')}"
        return Probe(name, False, version, f"installed but does not import ({error}); {use}. {advice}")
    return Probe(name, True, version, use)


def cuda() -> Probe:
    import torch

    if torch.cuda.is_available():
        names = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
        return Probe("cuda", True, torch.version.cuda, ", ".join(names))
    reason = "this torch is a CPU build" if torch.version.cuda is None else "no CUDA device is visible"
    return Probe("cuda", False, torch.version.cuda, f"{reason}; models run on the CPU")


def torchvision() -> Probe:
    """A torchvision that does not match torch is worse than none: diffusers and transformers import it."""
    version = _version("torchvision")
    if version is None:
        return Probe("torchvision", False, None, "not installed; nothing here needs it")
    error = _import("torchvision")
    if error:
        import torch

        return Probe(
            "torchvision",
            False,
            version,
            f"torchvision {version} does not work with torch {torch.__version__} ({error}). "
            "Install the matching one, pip install --upgrade torch torchvision, "
            "or remove it: pip uninstall torchvision",
        )
    return Probe("torchvision", True, version, "nothing here needs it; other packages use it")


def triton() -> Probe:
    version = _version("triton")
    if version is None:
        return Probe("triton", False, None, "not installed; comes with torch's CUDA builds for Linux")
    error = _import("triton")
    if error:
        return Probe("triton", False, version, f"does not import ({error})")
    if not cuda().active:
        return Probe("triton", False, version, "imports, but there is no CUDA device to run kernels on")
    return Probe("triton", True, version, "GPU kernels can be compiled")


def probes() -> list[Probe]:
    """All optional parts, in the order `accel info` prints them."""
    return [
        cuda(),
        triton(),
        torchvision(),
        _optional("xformers", "xformers", "xformers.ops", "an attention backend for CUDA"),
        _optional("matplotlib", "matplotlib", "matplotlib", "plots of accel bench"),
        _optional("torchmetrics", "torchmetrics", "torchmetrics", "LPIPS in accel evaluate"),
        _optional("cache-dit", "cache-dit", "cache_dit", "a peer in accel bench peers"),
    ]


class _TorchvisionLines(logging.Filter):
    """transformers says of every image processor that torchvision is missing. Nothing here uses one."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "requires torchvision" not in str(record.msg)


_without_torchvision_lines = _TorchvisionLines()


def quiet_torchvision() -> None:
    """Silence those lines, and nothing else that transformers logs. Before its image processors are imported."""
    # A logger takes the same filter once.
    logging.getLogger("transformers.utils.import_utils").addFilter(_without_torchvision_lines)


def require_sound_stack() -> None:
    """Raises `UnsupportedError` naming torchvision if it is installed but broken.

    Called before diffusers is imported: its own message in that case is about something else.
    """
    probe = torchvision()
    if probe.version is not None and not probe.active:
        raise UnsupportedError(probe.detail)


def dtype_argument(dtype: Any) -> dict[str, Any]:
    """The dtype as `from_pretrained` of the installed diffusers wants it: 0.42 renamed `torch_dtype`."""
    import diffusers
    from packaging.version import Version

    return {"dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype": dtype}
