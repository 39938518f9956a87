"""How long a picture of the built-in model takes on a GPU: as it is, and with CUDA graphs, plain and accelerated.

    python scripts/graphs_on_gpu.py [--rounds 7] [--budget 40]

Every row has a pipeline of its own, and all are measured in turn, in one process. A row is printed as soon as it is
warm; the table of medians comes last.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from typing import Any

import torch

import accel
from accel.pipelines.builtin import load_pipeline

PLAIN = accel.ForecastConfig(dense_steps_first=1000)
ROWS: dict[str, tuple[Any, bool | str]] = {
    "plain": (None, False),
    "plain + graphs": (PLAIN, "graphs"),
    "balanced + graphs": ("balanced", "graphs"),
    "fast + graphs": ("fast", "graphs"),
    "quality + graphs": ("quality", "graphs"),
    "draft + graphs": ("draft", "graphs"),
    "merging + graphs": ("merging", "graphs"),
    "few-step + graphs": ("few-step", "graphs"),
    "pruning 0.3 + graphs": (accel.TokenPruningConfig(budget=0.3), "graphs"),
    "balanced": ("balanced", False),
    "merging": ("merging", False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--budget", type=float, default=40, help="seconds after which no new row or round is begun"
    )
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    began = time.perf_counter()
    warnings.simplefilter("ignore", accel.AccelWarning)
    cuda = options.device.startswith("cuda")
    print(torch.cuda.get_device_name() if cuda else "CPU", torch.__version__, flush=True)

    def picture(pipe: Any) -> tuple[float, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        call = {"num_inference_steps": options.steps, "output_type": "latent", "generator": generator}
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        out = pipe("a photo of a red circle left of a blue square", **call).images
        if cuda:
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start), out

    ready: dict[str, Any] = {}
    for name, (config, compile) in ROWS.items():
        if time.perf_counter() - began > 0.7 * options.budget:
            print(f"{name}: not run, the budget is over")
            continue
        pipe = load_pipeline(device=options.device)
        pipe.set_progress_bar_config(disable=True)
        try:
            eager = picture(pipe)[1] if compile and config is PLAIN else None
            handle = (
                None if config is None else accel.accelerate(pipe, config, compile=compile if cuda else False)
            )
            times, outs = zip(*(picture(pipe) for _ in range(4)), strict=True)
        except Exception as error:
            print(f"{name}: FAILED {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        ready[name] = pipe, handle
        # The first picture runs as it is but for kinds that come again in it; the last is replayed.
        same = (outs[-1].float() - outs[0].float()).abs().max().item() / outs[0].float().abs().max().item()
        plain = "" if eager is None else f", to eager {(outs[-1] - eager).abs().max().item():.1e}"
        notes = "" if handle is None else f"{handle.compiled} {handle.stats.notes or ''}"
        print(
            f"{name}: {' '.join(f'{t:.1f}' for t in times)} ms; first to last {same:.1e}{plain} {notes}",
            flush=True,
        )

    taken: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(options.rounds):
        if time.perf_counter() - began > options.budget:
            break
        for name, (pipe, _) in ready.items():
            taken[name].append(picture(pipe)[0])
    if not all(taken.values()):
        return
    print(
        f"\n| {options.steps} steps, {len(taken['plain'])} rounds | ms a picture (median, min) | to plain | to plain + graphs | MiB |"
    )
    print("|---|---|---|---|---|")
    median = {name: statistics.median(times) for name, times in taken.items()}
    graphs = median.get("plain + graphs")
    for name, times in taken.items():
        handle = ready[name][1]
        kept = "" if handle is None else f"{handle.stats.cache_bytes / 2**20:.1f}"
        ratio = "" if graphs is None else f"{graphs / median[name]:.2f}x"
        print(
            f"| {name} | {median[name]:.1f}, {min(times):.1f} | {median['plain'] / median[name]:.2f}x | {ratio} | {kept} |"
        )


if __name__ == "__main__":
    main()
