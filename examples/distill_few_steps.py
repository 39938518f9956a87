"""Distil the built-in diffusion model to four (or eight) steps without guidance: low-rank changes in one side-car.

    python examples/distill_few_steps.py --out runs/turbo --seconds 2400             # CPU or GPU, resumable
    python examples/distill_few_steps.py --out runs/turbo-8 --steps 8 --seconds 1200 --start runs/turbo/turbo.safetensors

The built-in model takes 20 steps of two calls each; what this makes takes four of one call, as FLUX.1-schnell, Turbo and
Lightning versions of large models do. No pictures are needed: captions are drawn, and from each state of a walk the
frozen model, guided, goes the way of one student step in two second-order steps of its own. Their average velocity is
what the student is to predict without guidance, as in progressive distillation (Salimans and Ho 2022, arXiv:2202.00512),
with guidance put in as Meng et al. do (2022, arXiv:2210.03142).

Whose states? At first the teacher's, later more and more often the student's own, so that it learns to go on from
where its errors take it (Ross et al. 2011, arXiv:1011.0686). Each is used a few times before it is forgotten. Small
pictures come first, since they cost least and places mean the same: `--sizes` and `--shares` say for how long.

The step counts differ in what they ask of the model at the same noise, and FLUX is not told how far a step goes: so
train a side-car for each, the second from the first (`--start`), rather than one for both.

Every 20 seconds a checkpoint and the side-car of the moving average are written, each at once.

Seventy minutes of one core took four steps without guidance from a Scenes score of 0.646 to 0.854 (48 prompts; guided, four
steps are at 0.625, 24 steps at 0.917). That is `builtin-turbo`: pipelines/builtin/scenes-flux/TURBO.md.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from low_rank import LowRank, safe_backends
from scenes_latents import draw_captions
from scenes_text import encode
from torch import Tensor
from upcycle_chunking import EVERY, Model, guide
from upcycle_chunking import Run as _Run

from accel.core import sidecar
from accel.evaluation import judges, suites
from accel.pipelines import builtin
from accel.pipelines.builtin import turbo

KIND = turbo.KIND
WORLD = "flat"
KEPT = 16  # walks (of a batch each) that pairs are drawn from


def rank_of(path: str) -> int:
    """Modulations tell the time, and the time of a step means another thing here: they change as well."""
    return 12 if path.endswith(("norm.linear", "norm1.linear", "norm1_context.linear")) else 32


class Run(_Run):
    checkpoint, file, kind = "distill.pt", turbo.FILE.name, KIND
    metadata, kept_rank, int8 = {}, None, False

    def start(self, file: Path) -> None:
        """Begin with the changes of a side-car. Errors: see `sidecar.read`."""
        car = sidecar.read(file, KIND)
        car.check(self.model.net)
        tensors = {f"{path}.bias": bias for path, bias in car.biases.items()}
        for path, (a, b) in car.layers.items():
            tensors |= {f"{path}.A": a, f"{path}.B": b}
        self.student.load(tensors)
        for mean, p in zip(self.average, self.parameters, strict=True):
            mean.copy_(p.detach())


class Walks:
    """States on the way from noise to picture and the average velocity from each to the next, both kept for reuse.

    Args:
        steps: of the student's walks; one of them is drawn for each.
        batch: captions a walk, and pairs a training batch.
    """

    def __init__(self, model: Model, steps: list[int], batch: int, seed: int):
        self.model, self.steps, self.batch = model, steps, batch
        self.rng = np.random.default_rng([seed, 6])
        self.noise = torch.Generator(model.ids.device).manual_seed(seed)
        self.kept: deque[list[Tensor]] = deque(maxlen=KEPT)

    @torch.no_grad()
    def add(self, student: dict[str, Tensor] | None) -> int:
        """Walk once, by the steps of the student with these weights (None: the teacher's); returns how many."""
        model, base, device = self.model, self.model.bases[WORLD], self.model.ids.device
        pipe = model.pipes[WORLD]
        texts = [*draw_captions(self.rng, self.batch, WORLD), *[""] * self.batch]
        encoders = pipe.text_encoder, pipe.text_encoder_2, pipe.tokenizer, pipe.tokenizer_2
        features = encode(*encoders, texts, device)
        own = [feature[: self.batch] for feature in features]
        count = int(self.rng.choice(self.steps))
        x = torch.randn(self.batch, len(model.ids), 16, device=device, generator=self.noise)
        fine, rows = model.sigmas(2 * count), []
        for first, middle, last in zip(fine[:-1:2], fine[1::2], fine[2::2], strict=True):
            way = self._teacher(base, x, (first, middle, last), features)
            time = torch.tensor(first, device=device)
            rows.append([x, time.expand(self.batch), way, *own])
            if student is not None:
                way = model.predict(student, x, time, *own)
            x = x + (last - first) * way
        self.kept.append([torch.cat(column) for column in zip(*rows, strict=True)])
        return count

    def _teacher(self, base, x: Tensor, sigmas: tuple[float, float, float], features) -> Tensor:
        """Average velocity over two guided steps: Euler, then Adams-Bashforth of order 2."""
        first, middle, last = sigmas
        ways = []
        for sigma, step in ((first, middle - first), (middle, last - middle)):
            time = torch.tensor(sigma, device=x.device)
            way = guide(self.model.predict(base, torch.cat([x, x]), time, *features))
            if ways:
                way = way + 0.5 * step / (middle - first) * (way - ways[0])
            ways.append(way)
            x = x + step * way
        return ((middle - first) * ways[0] + (last - middle) * ways[1]) / (last - first)

    def pairs(self) -> list[Tensor]:
        """A training batch of what is kept: states (B, N, 16), times (B,), velocities (B, N, 16), text features."""
        picked = []
        for _ in range(self.batch):
            walk = self.kept[self.rng.integers(len(self.kept))]
            row = int(self.rng.integers(len(walk[0])))
            picked.append([column[row : row + 1] for column in walk])
        return [torch.cat(column) for column in zip(*picked, strict=True)]


def train(
    run: Run, model: Model, args: argparse.Namespace, until: float, batch: int, accel: Accelerator
) -> None:
    """One size, to `until` seconds of the whole run."""
    run.model = model
    walks = Walks(model, args.steps, batch, 1000 * accel.process_index + run.step)
    base, low = model.bases[WORLD], run.student
    saved_at = last = time.time()
    while run.seconds < until:
        progress = run.seconds / args.seconds
        student = low.changed(base) if walks.rng.random() < progress / args.own_from else None
        updates = args.reuse * walks.add(student)
        losses = []
        for _ in range(updates):
            x, times, way, *features = walks.pairs()
            loss = (model.predict(low.changed(base), x, times, *features) - way).square().mean()
            run.update(loss, progress, accel)
            losses.append(loss.detach())
        mean, now = torch.stack(losses).mean().item(), time.time()
        run.seconds, last = run.seconds + now - last, now
        left = max(0, args.seconds - run.seconds) / 60
        whose = "teacher" if student is None else "student"
        accel.print(
            f"{model.size} px, step {run.step}, {whose}'s states: loss {mean:.4f}, {run.seconds:.0f} s, "
            f"{left:.0f} min left",
            flush=True,
        )
        if now - saved_at > EVERY and accel.is_main_process:
            run.save()
            saved_at = now


@torch.no_grad()
def score(pipe, count: int, steps: int, guidance: float, size: int, seed: int) -> float:
    """Share of fresh prompts of held-out combinations that the detector takes for right."""
    lines = suites.take(suites.scenes(per_task=-(-count // 6), seed=seed).prompts, count)
    images = []
    for start in range(0, count, 8):
        part = lines[start : start + 8]
        generators = [torch.Generator().manual_seed(1000 * seed + line.id) for line in part]
        images.append(
            pipe(
                [line.text for line in part],
                num_inference_steps=steps,
                true_cfg_scale=guidance,
                height=size,
                width=size,
                generator=generators,
                output_type="pt",
            ).images
        )
    found = judges.scenes_judge().scorer(torch.cat(images).float().cpu(), None, lines)
    return sum(row["value"] for row in found) / count


def report(run: Run, args: argparse.Namespace, device: torch.device, dtype: torch.dtype | None) -> None:
    """Scores at the last size: plain, the same in few steps, and distilled."""
    pipe, size = builtin.load_pipeline(device, dtype), args.sizes[-1]
    pipe.set_progress_bar_config(disable=True)

    def row(name: str, steps: int, guidance: float) -> None:
        value = score(pipe, args.report, steps, guidance, size, args.seed)
        print(f"{name}, {steps} steps, guidance {guidance:g}: score {value:.3f} of {args.report}", flush=True)

    for steps, guidance in [(24, 3.0), *itertools.product(args.steps, (3.0, 1.0))]:
        row("plain", steps, guidance)
    sidecar.read(args.out / Run.file, KIND).merge(pipe.transformer)
    for steps in args.steps:
        row("distilled", steps, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint and side-car")
    parser.add_argument("--seconds", type=float, required=True, help="of training, all calls together")
    parser.add_argument("--start", type=Path, help="a side-car of this trainer to begin with")
    parser.add_argument("--steps", type=int, nargs="+", default=[4], help="of the student; best one number")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256], help="pixels, stage by stage")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.3, 0.35, 0.35], help="of the time")
    parser.add_argument(
        "--batches", type=int, nargs="+", help="default: 256, 128 and 128 on a GPU, 8, 4 and 4 on CPU"
    )
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--reuse", type=int, default=3, help="how often each state is used")
    parser.add_argument(
        "--own-from", type=float, default=0.6, help="part of the time from which all states are the student's"
    )
    parser.add_argument("--float32", action="store_true", help="on CPU bfloat16 is faster and the default")
    parser.add_argument("--report", type=int, default=48, help="prompts scored at the end; 0: none")
    parser.add_argument("--seed", type=int, default=7, help="of those prompts")
    args = parser.parse_args()
    accelerator = Accelerator()
    gpu = accelerator.device.type == "cuda"
    dtype = torch.float32 if args.float32 else (safe_backends(False) or torch.bfloat16)
    args.batches = args.batches or [(32 if gpu else 1) * max(4, 512 // size) for size in args.sizes]
    if not len(args.sizes) == len(args.shares) == len(args.batches):
        parser.error("--sizes, --shares and --batches want one value a stage each")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    stages = list(zip(args.sizes, args.batches, itertools.accumulate(args.shares), strict=True))
    model = Model([WORLD], args.sizes[0], accelerator.device, dtype=dtype)
    run = Run(args.out, model, LowRank(model.net, rank_of), args.rate)
    if args.start and not run.step:
        run.start(args.start)
    for size, batch, ends in stages:
        if run.seconds < ends * args.seconds:
            model = Model([WORLD], size, accelerator.device, dtype=dtype)
            train(run, model, args, ends * args.seconds, batch, accelerator)
    if accelerator.is_main_process:
        print(f"side-car: {run.save()} bytes", flush=True)
        if args.report:
            report(run, args, accelerator.device, dtype)


if __name__ == "__main__":
    main()
