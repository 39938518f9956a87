"""What a partial step of token pruning costs beyond its share of the tokens, and where.

    python examples/pruning_overhead.py --budget 0.3 --threads 1

Runs the built-in model plain and with `budget` of the tokens at every step, in turns, and times whole steps of
the denoising loop: the denoiser, the scheduler, and what pruning does between two steps. Reports time of a
partial step / (budget x time of a plain one), the same for multiply-accumulates, and a profile of both steps.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import accel
from accel.evaluation.bench.macs import counted
from accel.pipelines import builtin

#: Parts of an operator's name -> what it does for a step; the first that fits.
GROUPS = {
    "matrix products": ("mm", "linear", "convolution"),
    "attention": ("scaled_dot_product", "attention"),
    "moving tokens": ("index", "gather", "scatter", "cat", "copy_", "clone", "contiguous", "where", "repeat"),
    "norms": ("norm", "rsqrt", "mean", "pow", "rms"),
    "choosing tokens": ("sort", "topk", "pool", "cumsum"),
    "element-wise": ("add", "mul", "sub", "div", "gelu", "silu", "neg", "exp", "cos", "sin", "sum", "isnan"),
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
FIRST = 2  # dense steps, and not timed: forecasts need them


def steps_of(
    pipe: Any, config: Any, steps: int, clock: Callable[[], float], profiler: Any = None
) -> tuple[list[float], float]:
    """(seconds of each step after the first dense ones, seconds of them in the denoiser)."""
    marks, inside = [clock()], [0.0]
    calls: list[float] = []

    def mark(pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
        marks.append(clock())
        if profiler is not None and step == FIRST:
            profiler.start()
        if step == FIRST:
            calls.clear()
        return kwargs

    denoiser = pipe.transformer
    hooks = [
        denoiser.register_forward_pre_hook(lambda *_: inside.append(clock()), prepend=True),
        denoiser.register_forward_hook(lambda *_: calls.append(clock() - inside[-1])),
    ]
    try:
        with nullcontext() if config is None else accel.accelerate(pipe, config):
            pipe(
                "a photo of a red circle left of a blue square",
                num_inference_steps=steps + FIRST + 1,
                true_cfg_scale=1.0,
                output_type="latent",
                generator=torch.Generator().manual_seed(0),
                callback_on_step_end=mark,
            )
    finally:
        for hook in hooks:
            hook.remove()
    if profiler is not None:
        profiler.stop()
    # From the end of one step to the end of the next: choosing tokens for a step happens at the end of the last.
    return [b - a for a, b in zip(marks[FIRST + 1 :], marks[FIRST + 2 :], strict=False)], min(calls)


def profiled(pipe: Any, config: Any, steps: int) -> tuple[Counter, Counter, int]:
    """Milliseconds of a step by group and by operator, and operators per step."""
    profiler = profile(activities=[ProfilerActivity.CPU])
    steps_of(pipe, config, steps, time.perf_counter, profiler)
    groups: Counter = Counter()
    operators: Counter = Counter()
    count = 0
    for event in profiler.key_averages():
        milliseconds = event.self_cpu_time_total / 1e3 / steps
        name = event.key.removeprefix("aten::")
        group = next((g for g, parts in GROUPS.items() if any(p in name for p in parts)), "other")
        groups[group] += milliseconds
        operators[name] += milliseconds
        count += event.count
    return groups, operators, count // steps


def macs_of(pipe: Any, config: Any, steps: int) -> int:
    with nullcontext() if config is None else accel.accelerate(pipe, config), counted(pipe) as count:
        pipe("a photo", num_inference_steps=steps, true_cfg_scale=1.0, output_type="latent")
    return count.macs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--budget", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a run")
    parser.add_argument("--rounds", type=int, default=8, help="runs of each, in turns")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: the main thread's processor time, for a busy machine (with --threads 1)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--top", type=int, default=12, help="operators to list")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    pipe = builtin.load_pipeline(dtype=getattr(torch, args.dtype))
    pipe.set_progress_bar_config(disable=True)
    config = accel.TokenPruningConfig(cycle=(args.budget,), dense_steps_first=FIRST, dense_steps_last=0)

    plain_macs = macs_of(pipe, None, 1)
    partial_macs = macs_of(pipe, config, FIRST + 1) - FIRST * plain_macs
    share = partial_macs / plain_macs
    print(f"multiply-accumulates: {share:.3f} of a plain step, / budget = {share / args.budget:.2f}")

    steps: dict[str, list[float]] = {"plain": [], "partial": []}
    calls: dict[str, list[float]] = {"plain": [], "partial": []}
    ratios = []
    for _ in range(args.rounds):
        for name, its in (("plain", None), ("partial", config)):
            seconds, denoiser = steps_of(pipe, its, args.steps, CLOCKS[args.clock])
            steps[name].append(min(seconds))
            calls[name].append(denoiser)
        ratios.append(steps["partial"][-1] / (args.budget * steps["plain"][-1]))
    for name in steps:
        print(
            f"{name:8} step {1e3 * min(steps[name]):7.1f} ms, in the denoiser {1e3 * min(calls[name]):7.1f} ms"
            " (least of all rounds)"
        )
    least = min(steps["partial"]) / (args.budget * min(steps["plain"]))
    inside = min(calls["partial"]) / (args.budget * min(calls["plain"]))
    print(
        f"time / (budget x plain): {median(ratios):.2f} (median of {args.rounds} rounds), {least:.2f} (of the least "
        f"times), {inside:.2f} in the denoiser"
    )

    plain, _, plain_count = profiled(pipe, None, args.steps)
    groups, operators, count = profiled(pipe, config, args.steps)
    print(f"\n{'ms per step':18}{'plain':>9}{'partial':>9}{'budget x plain':>16}{'beyond it':>11}")
    for group in sorted({*plain, *groups}, key=lambda g: -groups[g]):
        fair = args.budget * plain[group]
        print(f"{group:18}{plain[group]:9.2f}{groups[group]:9.2f}{fair:16.2f}{groups[group] - fair:11.2f}")
    fair = args.budget * plain.total()
    print(f"{'all':18}{plain.total():9.2f}{groups.total():9.2f}{fair:16.2f}{groups.total() - fair:11.2f}")
    print(f"operators per step: {plain_count} plain, {count} partial")
    print("\noperators of a partial step, ms: ", end="")
    print(", ".join(f"{name} {ms:.2f}" for name, ms in operators.most_common(args.top)))


if __name__ == "__main__":
    main()
