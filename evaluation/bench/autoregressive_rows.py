"""The run folder of `accel bench ar --arch`: rows as they are measured, and the tables made of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from accel.evaluation.environment import environment
from accel.evaluation.records import Appender, read_records, write_atomically

from .autoregressive_shapes import (
    ACCEPTED,
    ARCHITECTURES,
    EAGER,
    TRANSFORMERS,
    Row,
    cases,
    free,
    measure,
    tiny,
)

NAME = "shapes"
_EXPLAINED = f"""\
Random weights of the published shapes: speed, nothing about images. ms: of a round, that is forward with guidance, draw or
verification, new state (median of passes; ways interleaved). bound: reading the weights and half an image's keys and values
at the bandwidth that a copy has here. A window's seconds per image assume the {", ".join(f"{v:.1f}" for w, v in ACCEPTED.items() if w in (8, 16, 32))}
tokens that a forward of 8, 16 and 32 makes final on the built-in model, image by image: a batch takes its slowest image's forwards,
the last of them for half, a quarter ... of the images. `transformers` is its model's forward with its own
dynamic cache, not its `generate`, which in 5.17 fails for Janus (an argument of `_prepare_static_cache` is missing). MiB: what caches
and graphs hold between rounds. beyond the forward: what a round, run in the fastest way, takes more than its forward alone. memory:
weights, caches and graphs of that way, against those of {EAGER}."""


def bench_shapes(
    path: Path,
    names: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    *,
    batches: Sequence[int],
    windows: Sequence[int],
    ways: Sequence[str],
    minutes: float = 60.0,
    dry: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Measure what is missing, write `report/shapes.md` and `.json`; returns the Markdown.

    Args:
        path: run folder; continued if it exists.
        names: of `ARCHITECTURES`.
        minutes: no case is begun after these.
        dry: tiny sizes, to try the command.
        say: gets each row at once.
    """
    began = time.perf_counter()
    path.mkdir(parents=True, exist_ok=True)
    file, where = path / "rows.jsonl", _device(device)
    rows = [*read_records(file)] if file.exists() else []
    known = {_key(row) for row in rows if not row["problem"]}
    with Appender(file) as records:
        for name in names:
            own_ways = [way for way in ways if not (way == TRANSFORMERS and ARCHITECTURES[name].llamagen)]
            todo = [
                (batch, window, left)
                for batch, window, own in cases(batches, windows, own_ways)
                if (
                    left := [
                        way for way in own if (name, way, batch, window, where, str(dtype), dry) not in known
                    ]
                )
            ]
            rest = 60 * minutes - (time.perf_counter() - began)
            if not todo or rest <= 0:
                continue
            shape = tiny(ARCHITECTURES[name]) if dry else ARCHITECTURES[name]
            for row in measure(name, shape, device, dtype, todo, seconds=rest):
                record = {**asdict(row), "device": where, "dtype": str(dtype), "dry": dry}
                records.write(record)
                rows.append(record)
                say(line(row))
            torch.compiler.reset()  # the next shape is compiled for itself, and counts for itself
            free(device)
    return _write(path, rows)


def line(row: Row) -> str:
    """A row in one short line."""
    parts = [f"{row.arch} b{row.batch} w{row.window} {row.way}:"]
    if row.ms is not None:
        parts.append(
            f"{row.ms:.2f} ms, least {row.least_ms:.2f}, bound {row.bound_ms:.2f}, {row.image_s:.3f} s an image"
        )
    if row.memory_mib is not None:
        parts.append(f"{row.memory_mib} MiB")
    if row.ms is not None and row.forward_ms is not None:
        parts.append(f"{row.ms - row.forward_ms:.2f} ms beyond the forward")
    return " ".join([*parts, row.problem])


def _key(row: dict[str, Any]) -> tuple:
    return tuple(row[name] for name in ("arch", "way", "batch", "window", "device", "dtype", "dry"))


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    result = {"environment": environment(), "rows": list(rows)}
    target = path / "report"
    write_atomically(target / f"{NAME}.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    page = target / f"{NAME}.md"
    write_atomically(
        page, "\n".join(["# Rounds at published sizes", "", _EXPLAINED, "", *table(rows)]) + "\n"
    )
    return page


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line per case, a column per way; the best way's seconds per image, how many times as many tokens as one by one in
    eager code those are, what its round takes beyond its forward, images per second against one image at a time, and memory
    against eager code's."""
    last = {_key(row): row for row in rows}  # of a case that was tried again
    ways = list(dict.fromkeys(row["way"] for row in last.values()))
    lines = [
        f"| model | images | window | {' | '.join(f'{way}, ms' for way in ways)} | bound, ms | image, s | over {EAGER} token | beyond the forward, ms | images/s over 1 | memory over {EAGER} |",
        "|---" * (len(ways) + 9) + "|",
    ]
    groups: dict[tuple, dict[str, dict[str, Any]]] = {}
    for key, row in last.items():
        groups.setdefault((key[0], *key[2:]), {})[row["way"]] = row
    for (arch, batch, window, *where), own in groups.items():
        fastest = min((row for row in own.values() if row["ms"]), key=lambda row: row["ms"], default=None)
        best = fastest and fastest["image_s"]
        base = groups.get((arch, batch, 1, *where), {}).get(EAGER, {}).get("image_s")
        cells = [f"{own[way]['ms']:.2f}" if way in own and own[way]["ms"] else "–" for way in ways]
        over = f"{base / best:.1f}x" if base and best else "–"
        image = "–" if best is None else f"{best:.3g}"
        bound = next(iter(own.values()))["bound_ms"]
        single = fastest and groups.get((arch, 1, window, *where), {}).get(fastest["way"])
        more = f"{single['image_s'] / best:.1f}x" if single and single["ms"] else "–"
        lines.append(
            f"| {arch} | {batch} | {window} | {' | '.join(cells)} | {bound:.2f} | {image} | {over} | {_beyond(fastest)} | "
            f"{more} | {_memory(fastest, own.get(EAGER))} |"
        )
    return lines


def _beyond(row: dict[str, Any] | None) -> str:
    return f"{row['ms'] - row['forward_ms']:.2f}" if row and row.get("forward_ms") else "–"


def _memory(row: dict[str, Any] | None, eager: dict[str, Any] | None) -> str:
    if not row or not eager or row["memory_mib"] is None or eager["memory_mib"] is None:
        return "–"
    weights = row.get("weights_mib")  # not in folders of before
    if weights is None:
        return "–"
    return f"{(row['memory_mib'] - eager['memory_mib']) / (weights + eager['memory_mib']):+.1%}"
