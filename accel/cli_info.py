"""`accel info`: versions, device, what is active and why the rest is not, presets."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from . import __version__, backends, configs
from .pipelines.builtin import FOLDER

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors")


def _versions() -> dict[str, str]:
    found = {"accel": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Versions, device, which backends are active and why the others are not, presets."""
    probes = backends.probes()
    has_model = (FOLDER / "model_index.json").is_file()
    builtin = str(FOLDER) if has_model else "missing: train it with examples/train_scenes_diffusion.py"
    if as_json:
        report = {
            "versions": _versions(),
            "backends": {probe.name: probe.as_dict() for probe in probes},
            "presets": configs.names(),
            "builtin": builtin,
        }
        typer.echo(json.dumps(report, indent=2))
        return
    console = Console()
    console.print("  ".join(f"{name} {number}" for name, number in _versions().items()), highlight=False)
    table = Table("backend", "active", "version", "", box=None, pad_edge=False)
    for probe in probes:
        table.add_row(
            probe.name,
            "[green]yes[/]" if probe.active else "[yellow]no[/]",
            probe.version or "–",
            probe.detail,
        )
    console.print(table)
    console.print(f"presets: {', '.join(configs.names())}", highlight=False)
    console.print(f"built-in model: {builtin}", highlight=False, soft_wrap=True)
