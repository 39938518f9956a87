"""`accel demo`: the same prompts and seeds, plain and accelerated, on the models that come along."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from accel.errors import AccelWarning

from . import common as c

PROMPTS = (
    "a photo of a red circle left of a blue square",
    "a photo of three hearts",
    "a photo of a purple heart and a yellow ring",
    "a photo of a green triangle",
)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture and the table.")] = Path("accel-out/demo"),
    ar: Annotated[
        bool, typer.Option("--ar", help="The autoregressive model and speculative decoding.")
    ] = False,
    preset: c.Preset = None,
    config: c.Config = None,
    steps: c.Steps = None,
    guidance: c.Guidance = None,
    temperature: c.Temperature = None,
    top_k: c.TopK = None,
    top_p: c.TopP = None,
    seed: c.Seed = 0,
    device: c.Device = None,
    dtype: c.Dtype = None,
    force: c.Force = False,
    as_json: c.Json = False,
) -> None:
    """Generate the same images plain and accelerated on a built-in model; show time and difference.

    Writes `side-by-side.png` and `demo.json`. Needs no download. A minute or two on two CPU cores.
    Default preset: balanced; with --ar: lossless.
    """
    from accel import generation as g
    from accel.evaluation.pictures import Column, side_by_side

    default = "lossless" if ar else "balanced"
    chosen = c.configuration(preset, config) or c.configuration(default, None)
    picture, record = out / "side-by-side.png", out / "demo.json"
    c.prepare(out, [picture, record], force)
    pipe = c.load(g.BUILTIN_AR if ar else g.BUILTIN, device, dtype)
    settings = g.Settings(steps=steps, guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p)
    settings.check(pipe)
    g.check_can_accelerate(pipe, chosen)
    jobs = [g.Job(prompt, seed + index) for index, prompt in enumerate(PROMPTS)]
    label = preset or (config.stem if config else default)

    ways = [g.Way.of(pipe, None), g.Way.of(pipe, chosen)]
    plain: list[Any] = []
    fast: list[Any] = []
    per_call = steps or g.default_steps(pipe) or 0
    with c.progress("drawing tokens" if ar else "denoising", 2 * len(jobs) * per_call) as advance:
        # Warm-up: first calls allocate and choose kernels; a decoder chooses its window.
        with warnings.catch_warnings():
            if not ar:  # two steps leave none to reduce, which the user did not ask for
                warnings.simplefilter("ignore", AccelWarning)
            for way in ways:
                g.timed(way, jobs[:1], settings if ar else g.Settings(2))
        for job in jobs:  # interleaved, so that a busy machine slows both alike
            for way, runs in zip(ways, (plain, fast), strict=True):
                runs.append(g.timed(way, [job], settings, on_step=advance))

    rows = c.pair_rows(jobs, plain, fast)
    summary = c.summarise(rows, label, chosen)
    accelerated = f"{summary['accelerated_seconds']:.2f} s per image, {summary['speedup']:.2f}x sooner"
    side_by_side(
        PROMPTS,
        [
            Column("plain", f"{summary['plain_seconds']:.2f} s per image", c.stack(plain)),
            Column(f"accel: {label}", accelerated, c.stack(fast)),
        ],
        picture,
    )
    result = {"summary": summary, "images": rows, "picture": str(picture)}
    record.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    c.show(result, as_json, f"The built-in Scenes model, {c.describe(pipe, per_call)}")
