"""What few tokens cost on both worlds of Scenes, and where: scores per task and per scale, decibels to the plain pictures.

    python examples/scenes_scores.py --worlds flat textured --rows plain matching:0.5 windows:0.5 windows:0.67 upcycled:0.67
    python examples/scenes_scores.py --worlds textured --set detail --per 8
    python examples/scenes_scores.py --truth --per 24        # detector and autoencoder, no model
    python examples/scenes_scores.py --density --per 4       # where tokens are kept, on pictures whose outlines are known

A row is plain, or `groups:share of tokens merged away`; `upcycled` is windows with the side-car of `--adapter`. All rows
draw the same prompts from the same noise. The six tasks are of held-out combinations; `--set detail` are the small,
tiny and thin shapes, for which merging should fail first: their scores are per scale. Intervals are 95 %, by bootstrap
over prompts; ± is the standard error of the mean.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxImg2ImgPipeline

import accel
from accel.evaluation import judges, scenes, suites
from accel.evaluation.bootstrap import mean_interval
from accel.evaluation.scenes import detail, scale_of
from accel.evaluation.scenes.render import edges_and_ground
from accel.pipelines import builtin
from accel.pipelines.builtin import textured
from accel.pipelines.builtin.architecture import TEXT_TOKENS


def config_of(row: str, adapter: Path | None) -> accel.TokenMergingConfig | None:
    name, _, share = row.partition(":")
    if name == "plain":
        return None
    groups = "matching" if name == "matching" else "windows"
    return accel.TokenMergingConfig(
        ratio=float(share),
        groups=groups,
        matching=accel.Matching(protect=0.0)
        if groups == "matching" and float(share) > 0.5
        else accel.Matching(),
        adapter=str(adapter) if name == "upcycled" else None,
        schedule=accel.Schedule(dense_first=1, dense_last=0, refresh_every=1),
    )


def prompts_of(which: str, per: int, seed: int) -> list[suites.Prompt]:
    if which == "tasks":
        return list(suites.scenes(per_task=per, seed=seed).prompts)
    lines = [line for lines in detail("test", per, seed).values() for line in lines]
    return [suites.Prompt(number, line.prompt, line) for number, line in enumerate(lines)]


def draw(pipe, config, prompts: list[suites.Prompt], steps: int, size: int = 256) -> torch.Tensor:
    """(n, 3, size, size) in [0, 1], on the CPU; one picture at a time, since a FLUX batch shares one plan."""
    with accel.accelerate(pipe, config) if config else contextlib.nullcontext():
        images = [
            pipe(
                prompt.text,
                num_inference_steps=steps,
                height=size,
                width=size,
                generator=torch.Generator("cpu").manual_seed(prompt.id),
                output_type="pt",
            ).images
            for prompt in prompts
        ]
    return torch.cat(images).float().cpu()


def truth(world: str, which: str, per: int, seed: int) -> None:
    """The detector on ground-truth renders, judged by their own prompts and by others."""

    def render(lines):
        drawn = scenes.render(scenes.sample_scenes(list(lines), np.random.default_rng(0), world), 256)
        return (drawn * 255).round().byte()

    def detect(images, lines):
        return scenes.detect(images, [scale_of(line.prompt) for line in lines])

    prompts = prompts_of(which, per, seed)
    for name in sorted({scale_of(p.text) or "tasks" for p in prompts}):
        lines = [p.metadata for p in prompts if p.metadata and (scale_of(p.text) or "tasks") == name]
        bounds = judges.ceiling_and_floor(lines, render, detect)
        ceiling, floor = (bounds[key]["overall"]["value"] for key in ("ceiling", "floor"))
        print(f"{world}, {name}: {len(lines)} renders, ceiling {ceiling:.3f}, floor {floor:.3f}", flush=True)


@torch.no_grad()
def autoencoder(world: str, per: int, seed: int) -> None:
    """How near the built-in autoencoder brings ground-truth renders back."""
    vae = builtin.load_pipeline("cpu").vae
    lines = [p.metadata for p in prompts_of("tasks", per, seed) if p.metadata]
    images = scenes.render(scenes.sample_scenes(lines, np.random.default_rng(0), world), 256)
    again = [vae.decode(vae.encode(x[None] * 2 - 1).latent_dist.mean).sample for x in images]
    error = (torch.cat(again).clamp(-1, 1) / 2 + 0.5 - images).square().mean((1, 2, 3))
    decibels = -10 * torch.log10(error)
    print(f"{world}, autoencoder: {len(lines)} renders, {decibels.mean():.1f} dB", flush=True)


@torch.no_grad()
def density(
    pipe, world: str, config: accel.DynamicChunkingConfig, per: int, seed: int
) -> tuple[float, float]:
    """Computed tokens per token on the outlines of objects and on the ground, over the reduced steps: renders are half
    drowned in noise and drawn again, so that where the outlines are is known."""
    lines = [p.metadata for p in prompts_of("tasks", per, seed) if p.metadata]
    drawn = scenes.sample_scenes(lines, np.random.default_rng(0), world)
    edge_BHW, ground_BHW = edges_and_ground(drawn, 8, 32)
    redraw = FluxImg2ImgPipeline(**pipe.components)
    redraw.set_progress_bar_config(disable=True)
    kept: list[list[float]] = []
    for line, image, edge_HW, ground_HW in zip(
        lines, scenes.render(drawn), edge_BHW, ground_BHW, strict=True
    ):
        with accel.accelerate(redraw, config) as handle:
            redraw(
                line.prompt,
                negative_prompt="",
                true_cfg_scale=3.0,
                image=image[None],
                strength=0.5,
                num_inference_steps=8,
                height=256,
                width=256,
                max_sequence_length=TEXT_TOKENS,
                generator=torch.Generator("cpu").manual_seed(seed),
                output_type="latent",
            )
            maps = [1 / sizes[0].cpu() for sizes in handle.boundary_maps() if sizes is not None]
        assert maps
        kept += [[m[edge_HW].mean().item(), m[ground_HW].mean().item()] for m in maps]
    on_edge, on_ground = np.mean(kept, 0)
    return float(on_edge), float(on_ground)


def summary(values: list[float], prompts: list[suites.Prompt]) -> str:
    found = mean_interval(values, [p.text for p in prompts], bounds=(0, 1))
    return f"{found.value:.3f} ({found.low:.2f} to {found.high:.2f})"


def rows(
    pipe, names: list[str], prompts: list[suites.Prompt], steps: int, adapter: Path | None, size: int = 256
) -> list[dict]:
    """A record for every picture of every row, and a printed line for each row; for `upcycled` after `windows` of the same
    share, the paired difference."""
    pipe.set_progress_bar_config(disable=True)
    judge, plain = judges.scenes_judge().scorer, draw(pipe, None, prompts, steps, size)
    records, measured = [], {}
    for row in names:
        config = config_of(row, adapter)
        images = plain if config is None else draw(pipe, config, prompts, steps, size)
        right = [float(found["value"]) for found in judge(images, None, prompts)]
        error = (images - plain).square().mean((1, 2, 3)).clamp(min=1e-12)
        decibels = measured[row] = (-10 * torch.log10(error)).numpy()
        text = (
            "" if config is None else f" {mean(decibels)} dB, a tenth below {np.quantile(decibels, 0.1):.1f}"
        )
        before = measured.get(row.replace("upcycled", "windows"))
        if before is not None and row.startswith("upcycled"):
            text += f", {mean(decibels - before, '+')} over windows"
        scores = {"all": summary(right, prompts)}
        for name in dict.fromkeys(group_of(p) for p in prompts):
            own = [r for r, p in zip(right, prompts, strict=True) if group_of(p) == name]
            scores[name] = f"{sum(own):.0f}/{len(own)}"
        print(f"{row}:{text} score {scores}", flush=True)
        records += [
            {"row": row, "prompt": p.text, "right": r, "db": float(d)}
            for p, r, d in zip(prompts, right, decibels, strict=True)
        ]
    return records


def mean(values: np.ndarray, sign: str = "") -> str:
    return f"{values.mean():{sign}.2f} ± {values.std(ddof=1) / len(values) ** 0.5:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", nargs="+", default=["flat", "textured"])
    parser.add_argument("--rows", nargs="+", default=["plain", "matching:0.5", "windows:0.5", "windows:0.67"])
    parser.add_argument("--set", dest="which", choices=["tasks", "detail"], default="tasks")
    parser.add_argument("--per", type=int, default=4, help="prompts of each task, or of each task and scale")
    parser.add_argument("--steps", type=int, nargs="+", default=[4])
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--adapter", type=Path, help="the side-car of `upcycled` rows")
    parser.add_argument("--textures", type=Path, help="default: the textured world's own side-car")
    parser.add_argument(
        "--truth", action="store_true", help="the detector and the autoencoder alone, no model"
    )
    parser.add_argument("--density", action="store_true", help="where tokens are kept, alone")
    parser.add_argument("--out", type=Path, help="JSON lines: a record for every picture")
    args = parser.parse_args()
    if args.truth:
        for world, which in (("flat", "tasks"), ("textured", "tasks"), ("textured", "detail")):
            truth(world, which, args.per, args.seed)
        for world in ("flat", "textured"):
            autoencoder(world, -(-args.per // 6), args.seed)
        return
    if args.density:
        for budget, router in itertools.product((0.5, 0.33), ("windows", "cosine", "predictability")):
            config = accel.DynamicChunkingConfig(router=router, budget=budget)
            edge, ground = density(builtin.load_pipeline(), "flat", config, args.per, args.seed)
            print(
                f"{router}, {budget:.0%}: {edge:.3f} on outlines, {ground:.3f} on the ground, {edge / ground:.2f}x"
            )
        return
    prompts = prompts_of(args.which, args.per, args.seed)
    records = []
    for world in args.worlds:
        pipe = builtin.load_pipeline(world="flat" if args.textures else world)
        if args.textures and world == "textured":
            textured.add_to(pipe, args.textures)
        for steps in args.steps:
            print(f"\n{world}, {steps} steps, {len(prompts)} prompts on {pipe.device}", flush=True)
            found = rows(pipe, args.rows, prompts, steps, args.adapter, args.size)
            records += [{"world": world, "steps": steps, **record} for record in found]
    if args.out:
        args.out.write_text("".join(json.dumps(record) + "\n" for record in records))


def group_of(prompt: suites.Prompt) -> str:
    assert prompt.metadata is not None
    return scale_of(prompt.text) or prompt.metadata.tag


if __name__ == "__main__":
    main()
