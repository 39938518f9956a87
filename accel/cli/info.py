"""`accel info`: versions, device, what is active and why the rest is not, presets."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from accel.strict import dump_json

from .terminal import console, say, visible

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors")


def _versions() -> dict[str, str]:
    from accel import __version__

    found = {"accel": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def _builtin() -> dict[str, str]:
    """Folder of each built-in model, or how to make it."""
    from accel.pipelines import builtin

    found = {}
    for name, folder, index, script in (
        ("builtin", builtin.FOLDER, "model_index.json", "train_scenes_diffusion.py"),
        ("builtin-turbo", builtin.FOLDER, "turbo.safetensors", "distill_few_steps.py"),
        ("builtin-textured", builtin.FOLDER, "textured.safetensors", "train_scenes_textured.py"),
        ("builtin-ar", builtin.AUTOREGRESSIVE_FOLDER, "config.json", "train_scenes_ar.py"),
    ):
        missing = f"missing: train it with examples/{script}"
        found[name] = str(folder) if (folder / index).is_file() else missing
    script = "missing: train it with examples/upcycle_chunking.py"
    found["upcycled"] = str(builtin.UPCYCLED) if builtin.UPCYCLED.is_file() else script
    return found


def _presets() -> dict[str, list[str]]:
    """Names of presets, by the method they configure."""
    from accel import configs, methods

    found: dict[str, list[str]] = {}
    for name in configs.names():
        method = methods.name_of(configs.load(name))
        found.setdefault(method, []).append(name)
    return found


def _weighing() -> dict[str, str]:
    """Forms of attention whose keys weigh as many tokens as they stand for, with what each says here."""
    import torch

    from accel.core.weighted_attention import working

    return working("cuda" if torch.cuda.is_available() else "cpu")


def _models() -> list[dict[str, str]]:
    """What each described denoiser takes, in the words of the table in docs/models.md."""
    from accel.pipelines import registry

    rows = []
    for name, adapter in registry.adapters().items():
        tokens, branches = adapter.tokens, adapter.branches
        kept = "yes" if adapter.attentions else "no keys kept"
        whole = tokens is not None and tokens.convolutional  # convolutions want the tokens of a U-Net whole
        prunes = tokens is not None and not whole and tokens.spread is not None
        rows.append(
            {
                "denoiser": name,
                "forecasts": "yes",
                "merging": ("stack, block" if whole else "span, block") if tokens else "no",
                "pruning": kept if prunes else "no",
                "branches": "yes" if branches.batched or branches.calls else "no",
            }
        )
    return rows


def info(
    models: Annotated[
        bool, typer.Option("--models", help="The described denoisers, and which methods each takes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Versions, device, which backends are active and why the others are not, presets, model families."""
    if models:
        return _show_models(as_json)
    return _show_all(as_json)


def _show_models(as_json: bool) -> None:
    rows = _models()
    if as_json:
        typer.echo(dump_json({"models": rows}))
        return
    table = Table(*rows[0], box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    say(
        "merging: scopes that reduce between the first and last block (span), within a stack of them, in each block."
    )
    say("pruning, no keys kept: with keys_values='none'. branches: guidance_every can leave one of them out.")
    say("Any other denoiser of diffusers takes forecasts: they need its prediction alone.")


def _show_all(as_json: bool) -> None:
    from accel import backends, configs, kernels
    from accel.pipelines import registry
    from accel.pipelines.autoregressive import registry as autoregressive

    running, why = kernels.status()
    probes = [*backends.probes(), backends.Probe("kernels", running, None, why)]
    built_in, presets = _builtin(), _presets()
    if as_json:
        report = {
            "versions": _versions(),
            "backends": {probe.name: probe.as_dict() for probe in probes},
            "presets": configs.names(),
            "presets_by_method": presets,
            "builtin": built_in["builtin"],
            "builtin_turbo": built_in["builtin-turbo"],
            "builtin_textured": built_in["builtin-textured"],
            "builtin_ar": built_in["builtin-ar"],
            "builtin_upcycled": built_in["upcycled"],
            "denoisers": registry.known(),
            "autoregressive_models": autoregressive.known(),
            "weighted_attention": _weighing(),
        }
        typer.echo(dump_json(report))
        return
    say("  ".join(f"{name} {number}" for name, number in _versions().items()))
    table = Table("backend", "active", "version", "", box=None, pad_edge=False)
    for probe in probes:
        active = Text("yes", "green") if probe.active else Text("no", "yellow")
        table.add_row(probe.name, active, probe.version or "–", Text(visible(probe.detail)))
    console.print(table)
    lines = [f"presets, {method}: {', '.join(names)}" for method, names in presets.items()]
    lines += [f"model {name}: {where}" for name, where in built_in.items() if name != "upcycled"]
    lines.append(f"adapter= of builtin and builtin-textured for few tokens: {built_in['upcycled']}")
    forms = ", ".join(name if why == "works" else f"no {name} ({why})" for name, why in _weighing().items())
    lines.append(
        f"attention in which windows weigh as their tokens: {forms}; the fastest is found at the first call"
    )
    lines.append(
        f"denoisers described: {len(registry.known())} (accel info --models); forecasts run on any other, too"
    )
    lines.append(f"autoregressive models: {', '.join(autoregressive.known())}")
    for line in lines:
        say(line)
