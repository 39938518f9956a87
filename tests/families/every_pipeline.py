"""Every image pipeline of the installed diffusers: which presets it takes, and the reason where it does not.

    PYTHONPATH=tests python tests/families/every_pipeline.py [--only NAME ...] [--write docs/measured/pipelines.md]

Without weights: a pipeline is put together from the parts of the family's tiny checkpoint (a `Case` of this folder) and
called with the arguments that its signature shares with that case's, and a picture, a mask or a strength where it asks
for one; or from its recipe (`recipes_*.py`), where it has one. One that does not run plain that way is not counted; whether its denoiser is described is said of all.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from case import of_all
from conftest import randomise
from PIL import Image
from recipe import assemble, classes_of
from test_conformance import CASES

import accel
from accel.errors import AccelError
from accel.pipelines import registry

RECIPES = of_all("recipes_*.py", "RECIPES")
#: What does not run anywhere, with diffusers' own parts.
NO_WAY = "cannot be had"
_BLIP = "its Blip2QFormerModel calls `invert_attention_mask`, which transformers 5 has no more"
CANNOT = {"BlipDiffusionControlNetPipeline": _BLIP, "BlipDiffusionPipeline": _BLIP}
PRESETS = ("balanced", "merging")
SECONDS = 120  # a pipeline; of random parts of sizes that do not go together, some never end
DENOISERS = ("transformer", "unet", "prior", "decoder")
COMMAND = "PYTHONPATH=tests python tests/families/every_pipeline.py --write docs/measured/pipelines.md"
#: By what their denoisers or their names say: sound, video, molecules, text, shapes.
NOT_IMAGES = (
    *("3DConditionModel", "UNetMotionModel", "SpatioTemporal", "I2VGen", "Audio", "AceStep", "Wan", "LTX"),
    *("Video", "Mochi", "Latte", "Allegro", "AnyFlow", "CogVideo", "Chrono", "EasyAnimate", "Helios", "Sky"),
    *("Motif", "RFD4", "Lucy", "UNet1D", "MusicLDM", "ShapE", "WM", "V2V", "I2V", "T2V", "TI2VA", "Omni3"),
    *("PredictBase", "Transfer", "ToWorld", "Cosmos3Omni", "DiffusionGemma", "LLaDA", "AnimateDiff", "PIA"),
)


@dataclass
class Row:
    """One pipeline."""

    pipeline: str
    denoiser: str
    described: bool
    plain: str = ""
    said: tuple[str, ...] = ()

    @property
    def ran(self) -> bool:
        return self.plain == "yes"


def image_pipelines() -> list[tuple[type, str]]:
    """(class, name of its denoiser's class) of all of them that have one."""
    found = []
    for name in sorted(dir(diffusers)):
        cls = getattr(diffusers, name) if name.endswith("Pipeline") else None
        if not (inspect.isclass(cls) and issubclass(cls, diffusers.DiffusionPipeline)):
            continue
        denoiser = denoiser_of(cls)
        if denoiser and not any(word in name + denoiser for word in NOT_IMAGES):
            found.append((cls, denoiser))
    return found


def denoiser_of(cls: type) -> str | None:
    parameters = inspect.signature(cls.__init__).parameters
    slot = next((name for name in DENOISERS if name in parameters), None)
    if slot is None:
        return None
    kinds = classes_of(cls, slot)
    return kinds[0].__name__ if kinds else None


@cache
def made() -> list[tuple[Any, type, str, set[str]]]:
    """(case, class of its pipeline, class of its denoiser, names of its parts)"""
    found = []
    for case in CASES.values():
        pipe = case.make()
        module = getattr(pipe, "transformer", None) or pipe.unet
        found.append((case, type(pipe), type(module).__name__, set(pipe.components)))
    return found


def cases_of(cls: type, denoiser: str) -> list[Any]:
    """Cases of this denoiser, those of the pipeline itself or of one with the same parts first."""
    wanted = set(inspect.signature(cls.__init__).parameters)

    def close(entry: tuple[Any, type, str, set[str]]) -> tuple:
        _, kind, _, parts = entry
        both_xl = ("XL" in cls.__name__) == ("XL" in kind.__name__)
        return (issubclass(kind, cls), both_xl, len(wanted & parts), -len(parts - wanted))

    return [entry[0] for entry in sorted(made(), key=close, reverse=True) if entry[2] == denoiser]


def builds(cls: type, case: Any) -> Iterator[Any]:
    """The pipeline from a case's parts, its denoiser with as many channels as the pipeline may want."""
    base = case.make()
    if isinstance(base, cls):
        yield base
        return
    yield assemble(cls, {**base.components})
    slot = "unet" if hasattr(base, "unet") else "transformer"
    kind, config = type(getattr(base, slot)), getattr(base, slot).config
    own = config.get("in_channels", 0)
    for channels in (8, 9, 5, 7) if slot == "unet" else (2 * own, 3 * own):
        options = {key: value for key, value in config.items() if not key.startswith("_")}
        options |= {"in_channels": channels, "out_channels": config.get("out_channels") or own}
        yield assemble(cls, {**base.components, slot: randomise(kind(**options), 0)})


def calls(pipe: Any, case: Any) -> Iterator[dict[str, Any]]:
    """Arguments that may suit the pipeline, pictures in several forms."""
    call = case.call(steps=10, wide=False, dtype=torch.float32)
    height, width = call.get("height", 32), call.get("width", 48)
    generator = torch.Generator().manual_seed(7)
    picture = Image.new("RGB", (width, height), (200, 30, 60))
    tensor = torch.rand(1, 3, height, width, generator=generator)
    names = inspect.signature(type(pipe).__call__).parameters
    own = {name: value for name, value in call.items() if name in names}
    yield own
    wanted = [n for n in names if n.endswith("image") and "ip_adapter" not in n and n not in call]
    for image in (picture, tensor, [picture] * 2):
        extra: dict[str, Any] = {
            **dict.fromkeys((n for n in wanted if "mask" not in n), image),
            "mask_image": Image.new("L", (width, height), 255),
            "mask": Image.new("L", (width, height), 255),
            "strength": 0.9,
        }
        yield {**{name: value for name, value in extra.items() if name in names}, **own}


def latents(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    call = {**call, "generator": torch.Generator().manual_seed(5)} if "generator" in call else call
    torch.manual_seed(5)  # some encode their pictures with no generator
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = pipe(**call)
    if isinstance(output, torch.Tensor):
        return output
    found = next(value for value in vars(output).values() if value is not None)
    return found if isinstance(found, torch.Tensor) else torch.stack([torch.as_tensor(one) for one in found])


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


def tried(cls: type, denoiser: str) -> Row:
    row = Row(cls.__name__, denoiser, denoiser in registry.known(), "no case of this denoiser")
    if cls.__name__ in CANNOT:
        row.plain = f"{NO_WAY}: {CANNOT[cls.__name__]}"
        return row
    if (recipe := RECIPES.get(cls.__name__)) is not None:
        try:
            pipe = recipe.make()
            plain = latents(pipe, recipe.call())
        except TimeoutError:
            raise
        except Exception as error:
            row.plain = first_line(error)
            return row
        return taken(row, pipe, recipe.call, plain)
    for case in cases_of(cls, denoiser)[:2]:
        try:
            for pipe in builds(cls, case):
                for call in calls(pipe, case):
                    try:
                        plain = latents(pipe, call)
                    except TimeoutError:
                        raise
                    except Exception as error:
                        row.plain = first_line(error)
                        continue
                    return taken(row, pipe, lambda call=call: call, plain)
        except TimeoutError:
            raise
        except Exception as error:
            row.plain = first_line(error)
    return row


def taken(row: Row, pipe: Any, call: Callable[[], dict[str, Any]], plain: torch.Tensor) -> Row:
    row.plain = "yes"
    row.said = tuple(outcome(pipe, call, plain, preset) for preset in PRESETS)
    return row


def outcome(pipe: Any, call: Callable[[], dict[str, Any]], plain: torch.Tensor, preset: str) -> str:
    """ "yes", or why not."""
    try:
        with accel.accelerate(pipe, preset) as handle:
            fast = latents(pipe, call())
    except AccelError as error:
        return first_line(error)
    except Exception as error:
        return f"CRASH {first_line(error)}"
    if not (torch.isfinite(fast.float()).all() and torch.equal(latents(pipe, call()), plain)):
        return "WRONG not finite, or not restored"
    return "yes" if handle.stats.share < 1 else "nothing was left out"


def table(rows: list[Row]) -> str:
    ran = [row for row in rows if row.ran]
    taken = {preset: sum(row.said[i] == "yes" for row in ran) for i, preset in enumerate(PRESETS)}
    described = sum(row.described for row in rows)
    lines = [
        "# Every image pipeline of diffusers",
        "",
        f"Pipelines of diffusers {diffusers.__version__} that make images with a denoiser, put together from tiny random checkpoints (no weights, no quality):",
        f"{len(rows)}, of which {described} have a denoiser that is [described](../models.md). {len(ran)} run plain here; of those {taken['balanced']} take `balanced`",
        f"and {taken['merging']} take `merging`. The rest want parts that cannot be made without their own files; forecasts do not look at them.",
        "",
        "```bash",
        COMMAND,
        "```",
        "",
        f"| pipeline | denoiser | plain | {' | '.join(PRESETS)} |",
        "|---|---|---|" + "---|" * len(PRESETS),
    ]
    for row in rows:
        plain = row.plain if row.ran or row.plain.startswith(NO_WAY) else "not here"
        said = [cell(text) for text in row.said] or ["–"] * len(PRESETS)
        lines.append(f"| {row.pipeline} | {row.denoiser} | {plain} | {' | '.join(said)} |")
    return "\n".join(lines) + "\n"


def kept(page: Path, rows: list[Row]) -> list[Row]:
    """The rows, and those of a page for the pipelines that are not among them."""
    again = {row.pipeline for row in rows}
    found = []
    for line in page.read_text(encoding="utf-8").splitlines() if page.is_file() else ():
        name, denoiser, plain, *said = (line.strip("| ").split(" | ") + [""] * 3)[: 3 + len(PRESETS)]
        if name.endswith("Pipeline") and name not in again:
            ran = tuple(said) if plain == "yes" else ()
            found.append(Row(name, denoiser, denoiser in registry.known(), plain, ran))
    return sorted([*rows, *found], key=lambda row: row.pipeline)


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("UnsupportedError: ", "refused: ")


def stop(*_: Any) -> None:
    raise TimeoutError(f"not over within {SECONDS} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", nargs="*", help="names of pipelines; the page keeps what it says of the others"
    )
    parser.add_argument("--write", type=Path, help="the page")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGALRM, stop)
    rows = []
    for cls, denoiser in image_pipelines():
        if options.only and cls.__name__ not in options.only:
            continue
        signal.alarm(SECONDS)
        try:
            row = tried(cls, denoiser)
        except TimeoutError as error:
            row = Row(cls.__name__, denoiser, denoiser in registry.known(), str(error))
        signal.alarm(0)
        rows.append(row)
        print(row.pipeline, row.denoiser, row.plain, *row.said, sep=" | ", flush=True)
    if options.write:
        rows = kept(options.write, rows) if options.only else rows
        options.write.write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
