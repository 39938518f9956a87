"""What speculative decoding keeps of the forwards that it saves on one core, in processor time, so that a busy machine may be used.

    OMP_NUM_THREADS=1 python scripts/autoregressive_on_cpu.py --calls 6

Calls of the built-in model, ways in turn in one process: seconds of plain decoding, and by window how much sooner, of how many
fewer forwards (a batch's are those of its slowest image). Before them the bound, from rounds in the middle of an image, in turn: a token's
round over a window's is the most that any decoder keeps of the forwards saved; and what would be, if nothing but the
layers' matrix products took longer for more tokens. Of batches also how much of them would be finished images, if they stayed whole,
and if they went on in halves, as captured ones do.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from typing import Any

import torch

import accel
from accel.core.decoding import Sampling
from accel.core.rounds import reach
from accel.evaluation.scenes.prompts import prompts
from accel.generation import load_pipeline


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=6)
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--windows", default="8,16,auto")
    given = parser.parse_args()
    torch.set_num_threads(1)
    windows = [int(one) if one.isdigit() else one for one in given.windows.split(",")]
    for dtype in given.dtypes.split(","):
        for batch in map(int, given.batches.split(",")):
            measure(dtype, batch, given.calls, windows)


def measure(dtype: str, batch: int, calls: int, windows: list[Any]) -> None:
    pipes = {}
    for way in ("plain", *windows):
        pipes[way] = load_pipeline("builtin-ar")
        pipes[way].to(getattr(torch, dtype)).set_progress_bar_config(disable=True)
    handles = {way: accel.accelerate(pipes[way], config(way)) for way in windows}
    lines = [entry.prompt for entry in prompts(per_task=calls)]
    lines = [line for task in range(calls) for line in lines[task::calls]]  # tasks in turn
    seconds: dict[object, list[float]] = {way: [] for way in pipes}
    fewer: dict[object, list[float]] = {way: [] for way in windows}
    rows: dict[object, list[tuple[int, int, int]]] = {way: [] for way in windows}
    for call in range(-1, calls):  # the first warms up, and times windows for "auto"
        own = [lines[(max(call, 0) * batch + i) % len(lines)] for i in range(batch)]
        for way, pipe in pipes.items():
            generators = [torch.Generator().manual_seed(batch * call + i) for i in range(batch)]
            began, before = time.process_time(), handles[way].stats.forwards if way in handles else 0
            pipe(own, generator=generators, output_type="tokens")
            if call < 0:
                continue
            seconds[way].append(time.process_time() - began)
            if way in handles:
                fewer[way].append(255 / (handles[way].stats.forwards - before))
                rows[way].append(rows_of(handles[way].stats.forwards_B.tolist()))
    print(bound(pipes[windows[0]], [one for one in windows if one != "auto"], batch), flush=True)
    print(f"{dtype}, {batch} images a call, {calls} calls: plain {statistics.median(seconds['plain']):.2f} s")
    for way in windows:
        ratios = [plain / own for plain, own in zip(seconds["plain"], seconds[way], strict=True)]
        sooner, saved = statistics.geometric_mean(ratios), statistics.geometric_mean(fewer[way])
        chosen = f" (chose {handles[way].stats.window})" if way == "auto" else ""
        print(
            f"  window {way}{chosen}: {sooner:.2f}x [{min(ratios):.2f}, {max(ratios):.2f}] with {saved:.2f}x fewer forwards: "
            f"{sooner / saved:.2f} of them{finished(rows[way]) if batch > 1 else ''}",
            flush=True,
        )


def rows_of(forwards: list[int]) -> tuple[int, int, int]:
    """Images in all forwards of a batch that stays whole, that goes on in halves, and that has none that is finished."""
    halves, size = 0, len(forwards)
    for turn in range(max(forwards)):
        going = sum(own > turn for own in forwards)
        while going <= size // 2:
            size //= 2
        halves += size
    return len(forwards) * max(forwards), halves, sum(forwards)


def finished(rows: list[tuple[int, int, int]]) -> str:
    whole, halves, needed = map(sum, zip(*rows, strict=True))
    return f"; finished images are {1 - needed / whole:.2f} of a whole batch, {1 - needed / halves:.2f} of one in halves, which takes {halves / whole:.2f}"


@torch.no_grad()
def bound(pipe: Any, windows: list[int], batch: int, repeats: int = 30) -> str:
    """T(1) / T(W) of rounds, and with the products' part of T(W) - T(1) alone."""
    widths = (1, *windows)
    defaults = pipe.adapter.defaults()
    sampling = Sampling(temperature=defaults.temperature, top_k=defaults.top_k, top_p=defaults.top_p)
    lines = [entry.prompt for entry in prompts(per_task=1)[:1]] * batch
    model, _ = pipe._prompted(lines, pipe.adapter.layout(None, None), defaults.guidance_scale)
    actions = {}
    for width in widths:
        rows = [
            torch.randn(2 * batch * width, columns, dtype=pipe.dtype) for columns in columns_of(model.stack)
        ]
        turn = pipe.decoder.round(model, sampling, width)

        def together(turn=turn, width=width) -> None:
            reach(model, width, model.forced_N.shape[0] // 2)
            turn()

        actions["round", width] = together
        actions["products", width] = partial(products, model.stack, rows)
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in actions}
    for turn in range(repeats + 1):
        for key, action in actions.items():
            began = time.process_time()
            action()
            if turn:
                seconds[key].append(time.process_time() - began)
    took = {key: statistics.median(found) for key, found in seconds.items()}
    token, product = took["round", 1], took["products", 1]
    return "; ".join(
        f"a round of {width}: {1e3 * took['round', width]:.2f} ms against {1e3 * token:.2f}, so at most "
        f"{token / took['round', width]:.2f}, if only products took longer {token / (token + took['products', width] - product):.2f}"
        for width in widths[1:]
    )


def columns_of(stack: Any) -> list[int]:
    return [weight.shape[1] for weight in weights_of(stack.layers[0])]


def weights_of(layer: Any) -> list[torch.Tensor]:
    return [*layer.qkv, layer.out, *layer.gate_up, layer.down]


def products(stack: Any, rows: list[torch.Tensor]) -> None:
    for layer in stack.layers:
        for weight, x in zip(weights_of(layer), rows, strict=True):
            torch.nn.functional.linear(x, weight)


def config(window: int | str) -> accel.SpeculativeDecodingConfig:
    return accel.SpeculativeDecodingConfig(window=window, auto_disable=window == "auto")


if __name__ == "__main__":
    main()
