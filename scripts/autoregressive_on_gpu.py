"""What a GPU says about autoregressive decoding, in at most four minutes.

    python scripts/autoregressive_on_gpu.py runs/ar-gpu             # on a GPU
    python scripts/autoregressive_on_gpu.py runs/ar-gpu --tiny      # a dry run on a CPU, at tiny sizes

The tests that captured rounds draw what eager ones draw; milliseconds of a round at Janus-Pro's sizes, with random weights;
seconds an image of the built-in model, eager and captured, and of 16 in one call; the share of Janus-Pro's VQ decoder. What matters most comes first, every row is printed at once,
and the tables come last. The long form of the second part is `accel bench ar RUN --arch janus-1b`.
"""

from __future__ import annotations

import argparse
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

import accel
from accel.evaluation.bench.autoregressive_rows import bench_shapes
from accel.generation import load_pipeline

#: (architecture, images, windows, ways), in order of importance.
ROWS = (
    ("janus-1b", (1,), (16, 32), ("captured", "eager", "transformers")),
    ("janus-7b", (1,), (16, 32), ("captured", "eager")),
    ("janus-1b", (16,), (16,), ("captured",)),
    ("janus-7b", (16,), (16,), ("captured",)),
    ("llamagen-xl", (1,), (16,), ("captured", "eager")),
    ("emu3", (1,), (16,), ("captured",)),
)
PROMPT = "a photo of three stars"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--minutes", type=float, default=1.5, help="nothing is begun after these")
    given = parser.parse_args()
    began, device = time.perf_counter(), torch.device("cpu" if given.tiny else "cuda")
    dtype = torch.float32 if given.tiny else torch.bfloat16
    lines: list[str] = []

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - began:5.1f} s] {text}", flush=True)

    def tests() -> None:
        import pytest

        where = Path(__file__).parents[1] / "tests" / "autoregressive" / "test_rounds.py"
        chosen = ["-m", "not slow and not gpu", "-k", "plain"] if given.tiny else ["-m", "gpu"]
        code = pytest.main(
            [str(where), "-q", "--no-header", "-o", "addopts=", "-p", "no:cacheprovider", *chosen]
        )
        lines.append(f"tests of captured rounds: {'passed' if code == 0 else f'FAILED ({code})'}")

    def built_in() -> None:
        for name, preset in (("plain", None), ("lossless", "lossless")):
            seconds = built_in_seconds(device.type, preset)
            lines.append(
                f"built-in model, {name}: {', '.join(f'{way} {s:.3f} s' for way, s in seconds.items())}"
            )
            say(lines[-1])

    def batch() -> None:
        images = 2 if given.tiny else 16
        alone, together = batch_seconds(device.type, images)
        lines.append(
            f"built-in model, lossless, {images} images: {alone:.3f} s one by one, {together:.3f} s in one call, "
            f"{alone / together:.1f}x the images per second"
        )
        say(lines[-1])

    def vq() -> None:
        for images in (1, 2 if given.tiny else 16):
            ms = 1e3 * vq_seconds(device, dtype, images, given.tiny)
            lines.append(f"Janus-Pro's VQ decoder, random weights, {images} images: {ms:.2f} ms")
            say(lines[-1])

    def shapes(row: tuple) -> Path | None:
        arch, batches, windows, ways = row
        left = given.minutes - (time.perf_counter() - began) / 60
        if given.tiny:
            ways = tuple(dict.fromkeys("eager" if way == "captured" else way for way in ways))
        if left <= 0:
            return None
        return bench_shapes(
            given.out, [arch], device, dtype, batches=batches, windows=windows, ways=ways, minutes=left,
            dry=given.tiny, say=say,
        )  # fmt: skip

    page = None
    parts: list[Callable[[], Path | None]] = [
        tests,
        *[lambda row=row: shapes(row) for row in ROWS[:3]],
        built_in,
        batch,
        vq,
    ]
    for part in (*parts, *[lambda row=row: shapes(row) for row in ROWS[3:]]):
        try:
            page = part() or page
        except Exception:  # the other parts are still worth their time
            traceback.print_exc()
    if page is not None:
        print("\n".join(row for row in page.read_text().splitlines() if row.startswith("|")))
    print("\n".join(lines))


def built_in_seconds(device: str, preset: str | None) -> dict[str, float]:
    """Seconds of a call that makes one image's tokens, median of three, eager and captured in turn."""
    ways = {}
    for way in ("eager", "captured"):
        pipe = load_pipeline("builtin-ar", device)
        pipe.graphs = way == "captured"
        pipe.set_progress_bar_config(disable=True)
        if preset:
            accel.accelerate(pipe, preset)
        ways[way] = pipe
    times: dict[str, list[float]] = {way: [] for way in ways}
    for seed in range(5):
        for way, pipe in ways.items():
            began = time.perf_counter()
            pipe(PROMPT, generator=torch.Generator().manual_seed(seed), output_type="tokens").images.cpu()
            times[way].append(time.perf_counter() - began)
    return {way: statistics.median(found[2:]) for way, found in times.items()}  # the first two warm up


def batch_seconds(device: str, images: int) -> tuple[float, float]:
    """(Seconds of the same images one by one, and in one call): the third time, so that all of it is captured."""
    pipe = load_pipeline("builtin-ar", device)
    pipe.set_progress_bar_config(disable=True)
    accel.accelerate(pipe, "lossless")
    for _ in range(1 if device == "cpu" else 3):
        took = []
        for size in (1, images):
            began = time.perf_counter()
            for first in range(0, images, size):
                seeds = range(first, first + size)
                generators = [torch.Generator().manual_seed(seed) for seed in seeds]
                pipe([PROMPT] * size, generator=generators, output_type="tokens").images.cpu()
            took.append(time.perf_counter() - began)
    return took[0], took[1]


@torch.no_grad()
def vq_seconds(device: torch.device, dtype: torch.dtype, images: int, tiny: bool) -> float:
    """Of decoding tokens to 384 x 384 pixels, the least of five."""
    from transformers import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAE

    side, small = (4, {"base_channels": 32}) if tiny else (24, {})
    model = JanusVQVAE(JanusVQVAEConfig(num_patches=side, **small)).eval().to(device, dtype)
    token_BT = torch.zeros(images, side * side, dtype=torch.int64, device=device)
    times = []
    for _ in range(6):
        began = time.perf_counter()
        model.decode(token_BT).cpu()
        times.append(time.perf_counter() - began)
    return min(times[1:])


if __name__ == "__main__":
    main()
