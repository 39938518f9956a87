"""Weight files of other people's models: explicit paths, checked hashes, nothing downloaded here."""

from __future__ import annotations

import hashlib
import importlib
import pickle
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .errors import WeightsError
from .textfiles import first_line


@dataclass(frozen=True)
class WeightFile:
    """A published file: its name, its SHA-256 (or the start of it, as torch hub names carry), its source."""

    name: str
    sha256: str
    url: str

    def check(self, path: str | Path, sha256: str | None = None) -> Path:
        """Return `path` if it is this file (a folder is looked into), else raise `WeightsError`.

        `sha256` replaces the published hash for a file of one's own, e.g. a re-export.
        """
        path, expected = Path(path), (sha256 or self.sha256).lower()
        path = path / self.name if path.is_dir() else path
        advice = f"expected SHA-256 {expected}{'' if len(expected) == 64 else '...'}, from {self.url}"
        if not path.is_file():
            raise WeightsError(f"{path}: no such weight file; {advice}")
        actual = file_sha256(path)
        if not actual.startswith(expected):
            raise WeightsError(f"{path}: SHA-256 is {actual}; {advice}")
        return path


def file_sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:  # hashlib.file_digest is Python 3.11's; 3.10 is supported
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(module: torch.nn.Module) -> str:
    """Eight hex digits over a model's parameters and buffers: what a result was really made with."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:8]


def load_pickle_free(path: Path) -> dict[str, Any]:
    """Load tensors only (`weights_only`); a file that wants to run code is refused by name."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise WeightsError(f"{path}: not a readable tensor file: {first_line(error)}") from error


def require_module(name: str, purpose: str) -> ModuleType:
    """Import an optional dependency, or say what it is needed for and how to get it."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        # A torchvision that does not match torch fails with RuntimeError or AttributeError, not
        # ImportError; that case is the one whose own message helps least.
        raise WeightsError(
            f"{purpose} needs the package {name!r}, which cannot be imported "
            f"({type(error).__name__}: {error}); pip install 'accel-image[eval]'"
        ) from error
