"""`accel demo`: the same prompts and seeds, plain and accelerated, on the models that come along."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from accel.errors import AccelWarning, ConfigError
from accel.strict import StrictError, dump_json, read_json

from . import common as c
from . import results
from .terminal import progress_console, say

PROMPTS = (
    "a photo of a red circle left of a blue square",
    "a photo of three hearts",
    "a photo of a purple heart and a yellow ring",
    "a photo of a green triangle",
)

_MARK = "accel demo"


def _is_ours(file: Path) -> bool:
    """An earlier demo's, which this one may take the place of; a file of one's own by the same name is not."""
    if file.suffix == ".json":
        try:
            return read_json(file).get("made_by") == _MARK
        except (OSError, StrictError):
            return False
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.info.get("made by") == _MARK
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ):  # PIL: not a picture, or a broken one
        return False


#: Columns of the picture of maps; of more steps, evenly spread ones.
_MAPS = 8


def _of_method(method: str | None, preset: str | None, config: Path | None) -> Any:
    """The default configuration of a method; None: none is asked for."""
    from accel import configs

    if method is None:
        return None
    if preset is not None or config is not None:
        raise ConfigError("--method, --preset and --config all name a configuration: give one")
    return configs.load({"method": {"chunking": "dynamic_chunking"}.get(method, method)})


@contextmanager
def _attached(pipe: Any, config: Any, maps: list[list[Any]]) -> Iterator[Any]:
    """Accelerated; at the end, the boundary maps of the last run are added to `maps`, where the method has any."""
    from accel import DynamicChunkingConfig, accelerate

    with accelerate(pipe, config) as handle:
        yield handle
        if isinstance(config, DynamicChunkingConfig):
            maps.append(handle.boundary_maps())


def _map_columns(maps: list[list[Any]], size: tuple[int, int]) -> list[Any]:
    """A column per reduced step, if any: light where tokens were computed on their own, dark where with many others."""
    import torch

    from accel.evaluation.pictures import Column

    columns = []
    steps = [step for step in range(len(maps[0])) if maps[0][step] is not None]
    for step in steps[:: -(-len(steps) // _MAPS) or 1]:
        sizes = torch.stack([image[step][0] for image in maps])[:, None].cpu()
        shade = 1 - 0.2 * sizes.log2()
        images = torch.nn.functional.interpolate(shade, size=size).expand(-1, 3, -1, -1)
        columns.append(Column(f"step {step + 1}", f"{100 * (1 / sizes).mean():.0f} % computed", images))
    return columns


def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the picture and the table. Default: accel-out/demo; with --ar: accel-out/demo-ar.",
            show_default=False,
        ),
    ] = None,
    ar: Annotated[
        bool, typer.Option("--ar", help="The autoregressive model and speculative decoding.")
    ] = False,
    preset: c.Preset = None,
    config: c.Config = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="A method with its default settings, by name; of chunking, also its maps over the steps."
        ),
    ] = None,
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

    Writes side-by-side.png and demo.json (with chunking boundary-maps.png, too: dark is what was computed together), over
    those of an earlier demo. Needs no download. A minute or two on two CPU cores. Default preset: balanced; with --ar: lossless.
    """
    from accel import generation as g
    from accel.evaluation.pictures import Column, side_by_side

    default = "lossless" if ar else "balanced"
    chosen = (
        _of_method(method, preset, config)
        or c.configuration(preset, config)
        or c.configuration(default, None)
    )
    settings = g.Settings(steps=steps, guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p)
    c.check_seeds(seed, len(PROMPTS))
    out = out or Path("accel-out", "demo-ar" if ar else "demo")
    picture, record, drawn = out / "side-by-side.png", out / "demo.json", out / "boundary-maps.png"
    c.check_out(out, [file for file in (picture, record, drawn) if not _is_ours(file)], force)
    model = g.BUILTIN_AR if ar else g.BUILTIN
    pipe = c.load(model, device, dtype)
    settings.check(pipe)
    g.check_can_accelerate(pipe, chosen)
    jobs = [g.Job(prompt, seed + index) for index, prompt in enumerate(PROMPTS)]
    label = preset or method or (config.stem if config else default)
    made_by = c.recipe(pipe, settings, model, label, chosen)
    c.make_out(out)

    maps: list[list[Any]] = []
    ways = [g.Way.of(pipe, None), g.Way(pipe, partial(_attached, config=chosen, maps=maps))]
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
        maps.clear()
        for job in jobs:  # interleaved, so that a busy machine slows both alike
            for way, runs in zip(ways, (plain, fast), strict=True):
                runs.append(g.timed(way, [job], settings, on_step=advance))

    columns = _map_columns(maps, plain[0].images.shape[-2:]) if maps else []
    if columns:
        side_by_side(PROMPTS, columns, drawn, {"made by": _MARK})
    elif maps:
        say(f"no step was on fewer tokens: no {drawn.name}", to=progress_console)
    rows = results.pair_rows(jobs, plain, fast)
    summary = results.summarise(rows, label, chosen)
    accelerated = f"{summary['accelerated_seconds']:.2f} s per image, {summary['speedup']:.2f}x sooner"
    side_by_side(
        PROMPTS,
        [
            Column("plain", f"{summary['plain_seconds']:.2f} s per image", results.stack(plain)),
            Column(f"accel: {label}", accelerated, results.stack(fast)),
        ],
        picture,
        {"made by": _MARK, "recipe": json.dumps({**made_by, "seed": seed}, default=str)},
    )
    result = {"made_by": _MARK, "summary": summary, "images": rows, "picture": str(picture)}
    if columns:
        result["boundary_maps"] = str(drawn)
    record.write_text(dump_json(result) + "\n", encoding="utf-8")
    results.show(result, as_json, f"The built-in Scenes model, {c.describe(pipe, per_call)}")
