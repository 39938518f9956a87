"""How long a picture of the built-in model takes on a GPU: as it is, and with CUDA graphs, plain and accelerated.

    python scripts/graphs_on_gpu.py [--rounds 5] [--budget 30]

Every row has a pipeline of its own, and all are measured in turn, in one process. A row is printed as soon as it is
warm; the table of medians comes last.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from typing import Any

import torch

import accel
from accel.pipelines.builtin import load_pipeline
from accel.pipelines.timing import measure

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
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--budget", type=float, default=30, help="seconds after which no new row or round is begun"
    )
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    began = time.perf_counter()
    warnings.simplefilter("ignore", accel.AccelWarning)
    cuda = options.device.startswith("cuda")
    print(torch.cuda.get_device_name() if cuda else "CPU", torch.__version__, flush=True)

    first = load_pipeline(device=options.device)
    first.set_progress_bar_config(disable=True)
    print(f"loaded after {time.perf_counter() - began:.1f} s", flush=True)

    def another() -> Any:
        """A pipeline with a denoiser and a scheduler of its own."""
        pipe = copy.copy(first)
        pipe.transformer, pipe.scheduler = copy.deepcopy(first.transformer), copy.deepcopy(first.scheduler)
        return pipe

    def picture(pipe: Any) -> tuple[float, float, torch.Tensor]:
        """(ms of the call, ms in the denoiser, latents)"""
        call = {"num_inference_steps": options.steps, "height": options.size, "width": options.size}
        with measure(pipe) as clock:
            generator = torch.Generator().manual_seed(0)
            prompt = "a photo of a red circle left of a blue square"
            out = pipe(prompt, output_type="latent", generator=generator, **call).images
        return 1e3 * clock.seconds, 1e3 * (clock.denoiser_seconds or 0), out

    ready: dict[str, Any] = {}
    for name, (config, compile) in ROWS.items():
        if time.perf_counter() - began > 0.7 * options.budget:
            print(f"{name}: not run, the budget is over")
            continue
        pipe = another()
        try:
            eager = picture(pipe)[2] if config is PLAIN else None
            handle = (
                None if config is None else accel.accelerate(pipe, config, compile=compile if cuda else False)
            )
            times, _, outs = zip(*(picture(pipe) for _ in range(3 if handle else 2)), strict=True)
        except Exception as error:
            print(f"{name}: FAILED {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        ready[name] = pipe, handle
        # The first picture runs as it is but for kinds of calls that come again in it; the last is replayed.
        same = (outs[-1].float() - outs[0].float()).abs().max().item() / outs[0].float().abs().max().item()
        plain = "" if eager is None else f", to eager {(outs[-1] - eager).abs().max().item():.1e}"
        notes = "" if handle is None else f"{handle.compiled} {handle.stats.notes or ''}"
        print(
            f"{name}: {' '.join(f'{t:.1f}' for t in times)} ms; first to last {same:.1e}{plain} {notes}",
            flush=True,
        )

    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ready}
    for _ in range(options.rounds):
        if time.perf_counter() - began > options.budget:
            break
        for name, (pipe, _) in ready.items():
            taken[name].append(picture(pipe)[:2])
    if not taken or not all(taken.values()):
        return
    print(f"\n{options.steps} steps, {options.size} px, medians of {len(taken['plain'])} rounds, ms")
    print("| | picture | denoiser | picture to plain + graphs | denoiser to plain + graphs | kept MiB |")
    print("|---|---|---|---|---|---|")
    median = {
        name: [statistics.median(ms) for ms in zip(*times, strict=True)] for name, times in taken.items()
    }
    graphs = median.get("plain + graphs", [float("nan")] * 2)
    for name, (whole, denoiser) in median.items():
        handle = ready[name][1]
        kept = "" if handle is None else f"{handle.stats.cache_bytes / 2**20:.1f}"
        ratios = f"{graphs[0] / whole:.2f}x | {graphs[1] / max(denoiser, 1e-9):.2f}x"
        print(f"| {name} | {whole:.1f} | {denoiser:.1f} | {ratios} | {kept} |", flush=True)


if __name__ == "__main__":
    main()
