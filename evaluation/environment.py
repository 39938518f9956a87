"""What a run was made with: versions, device, source revision."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "accel-image", "torch", "diffusers", "transformers", "accelerate", "triton", "cache-dit", "numpy", "pillow",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions of what computes, the device, and the git revision if this is a checkout."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    versions["torch"] = str(torch.__version__)  # with the build, e.g. +cu130, which metadata leaves out
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "git": _revision(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }


#: Of a start's record: what may change the pixels, by the name it is called by.
_MATTERS = ("accel-image", "torch", "diffusers", "transformers")


def changes(starts: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is not the same in all records of starts: "torch 2.13.0 and 2.14.1". Said, not refused: pictures of
    two versions mostly differ by rounding."""
    found: dict[str, dict[str, None]] = {}
    for start in starts:
        made_with = {name: start["versions"].get(name) for name in _MATTERS}
        for name, value in {
            **made_with,
            "device": start["device"],
            "source revision": start.get("git"),
        }.items():
            found.setdefault(name, {})[str(value or "unknown")] = None
    return [f"{name} {' and '.join(values)}" for name, values in found.items() if len(values) > 1]


def _revision() -> str | None:
    def git(*arguments: str) -> str:
        folder = Path(__file__).resolve().parent
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        # Installed into an environment inside somebody else's checkout, its revision says nothing about us.
        if not git("ls-files", Path(__file__).name):
            return None
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")  # Linux; elsewhere platform knows
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
