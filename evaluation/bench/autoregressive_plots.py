"""Plots of `accel bench ar`, with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

#: How a configuration is drawn: by the beginning of its name.
_FAMILIES = {
    "lossless": ("o", "#0b6e4f"),
    "sjd": ("s", "#8d99ae"),
    "gsd": ("^", "#c8553d"),
    "grouped": ("D", "#e09f3e"),
    "mixture-as-grouped": ("P", "#4361ee"),
    "budget-group": ("v", "#7b2cbf"),
    "budget-mixture": ("X", "#4895ef"),
    "transformers": ("*", "#333333"),
    "plain": ("h", "#999999"),
}


def trade_off(rows: Sequence[dict[str, Any]], bounds: dict[str, Any] | None, path: Path) -> None:
    """Speedup over plain decoding against what it costs: total variation, and the suite's score if there is one."""
    scored = [row for row in rows if row["score"]]
    figure = Figure(figsize=(11 if scored else 6, 4.5), layout="constrained")
    axes = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]
    _scatter(axes[0], [row for row in rows if row["tv_per_token"]], "tv_per_token")
    axes[0].set_ylabel("total variation per token (0 is lossless)")
    if scored:
        _scatter(axes[1], scored, "score")
        axes[1].set_ylabel("scenes score")
        if bounds and bounds.get("ceiling"):
            axes[1].axhline(
                bounds["ceiling"]["overall"]["value"], color="#bbb", linestyle=":", label="ceiling"
            )
    for one in axes:
        one.set_xlabel("speedup over plain decoding")
        one.axvline(1, color="#ddd", linewidth=1, zorder=0)
    axes[-1].legend(fontsize=8)
    figure.savefig(path, dpi=150)


def batch_sizes(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Images per second against images per call."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    most = len({row["batch_size"] for row in rows})
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        if len(own) == most:
            x = [row["batch_size"] for row in own]
            axes.plot(x, [row["images_per_second"] for row in own], marker="o", markersize=4, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("images per call")
    axes.set_ylabel("images per second")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def _scatter(axes: Any, rows: Sequence[dict[str, Any]], key: str) -> None:
    for family, (marker, color) in _FAMILIES.items():
        own = [row for row in rows if row["name"].startswith(family) and row["speedup"]["value"]]
        if not own:
            continue
        x, y = [row["speedup"]["value"] for row in own], [row[key]["value"] for row in own]
        axes.errorbar(
            x, y, _reach(own, key), _reach(own, "speedup"), fmt=marker, color=color, markersize=6,
            elinewidth=0.8, label=family,
        )  # fmt: skip


def _reach(rows: Sequence[dict[str, Any]], key: str) -> list[list[float]]:
    """Lengths of the interval's two ends, as matplotlib takes them; 0 where there is none."""
    entries = [row[key] for row in rows]
    return [
        [0 if e["low"] is None else e["value"] - e["low"] for e in entries],
        [0 if e["low"] is None else e["high"] - e["value"] for e in entries],
    ]
