"""Upcycle the built-in diffusion model to few tokens: low-rank changes of it, and a decoder behind it, with which windows
cost less quality.

    python examples/upcycle_chunking.py --out runs/upcycled --seconds 3600            # CPU or GPU, resumable
    accelerate launch examples/upcycle_chunking.py --out runs/upcycled --seconds 600

As DC-DiT (arXiv:2603.06351) upcycles a pretrained transformer: distilled from the dense model, then flow matching
(`--flow-share`), with the budget drawn anew for every walk, so that one checkpoint serves all of 25 to 50 %. What is
different here: which tokens share a slot is told by windows (`accel.methods.windows`), and what is trained is the model
at reduced tokens and the decoder (`accel.methods.decoder`), not a router.

Distillation needs no pictures: captions are drawn, the student walks the sampler's own steps with guidance, and at each
step but the first it is to predict, on the windows that the step before tells, what the frozen dense model predicts
there. What it predicts goes the way it goes when it is used: means of windows as computed, deviations carried from the
step before, the decoder's on top. The student is the frozen model with changed weights; at dense steps the changes are
off, so that those stay exact. What it is worth is measured at the end under accel's own hooks, on prompts of the test
set.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from low_rank import LowRank, exact_times, parameters, safe_backends, truncated, velocity
from scenes_latents import Latents, Workers, draw_captions
from scenes_scores import prompts_of, rows
from scenes_text import encode
from torch import Tensor, nn
from train_scenes_diffusion import image_ids

from accel.core import sidecar
from accel.core.plan import TokenPlan
from accel.methods import decoder, learned, windows
from accel.pipelines import builtin
from accel.pipelines.builtin import textured
from accel.pipelines.builtin.architecture import TEXT_TOKENS, shift_for

LIMIT = 4_000_000  # bytes
EVERY = 20  # seconds between checkpoints
GUIDANCE = 3.0
# Of what was trained: all of it gains no more (12 prompts), and costs a fifth of a narrow layer's arithmetic.
KEPT_RANK = 8
MOST = 0.5  # of the tokens; above, it is off: it costs more there than it gains
STEPS = (4, 4, 4, 6, 8)  # of the walks; one is drawn for each


def rank_of(path: str) -> int:
    return 6 if path.endswith(("norm.linear", "norm1.linear", "norm1_context.linear")) else 24


class Reduced:
    """A FLUX transformer on windows from its second block on, with a plan for each image of the batch.

    What `accel`'s span does at inference, where FLUX's rotary table, one for the batch, allows one plan: here the
    tables are applied row by row behind the query and key norms, and the processor gets none.
    """

    def __init__(self, model: nn.Module, first: int = 1):
        self.plan: TokenPlan | None = None
        self.full = self.reduced = self.cos = self.sin = torch.empty(0)
        blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
        for index, block in enumerate(blocks[first:]):
            block.register_forward_pre_hook(self._enter if index == 0 else self._follow, with_kwargs=True)
            for norm in (block.attn.norm_q, block.attn.norm_k):
                norm.register_forward_hook(self._rotate)
        blocks[-1].register_forward_hook(self._leave)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        if self.plan is None:
            return None
        plan, x_BNC = self.plan, kwargs["hidden_states"]
        tables = [
            t[TEXT_TOKENS:].float().expand(plan.owner.shape[0], -1, -1) for t in kwargs["image_rotary_emb"]
        ]
        cos, sin = (plan.reduce(t)[:, :, None] for t in tables)
        length = (cos.square() + sin.square()).sqrt()
        self.cos, self.sin = ((t / length).to(x_BNC.dtype) for t in (cos, sin))
        self.full, self.reduced = x_BNC, plan.reduce(x_BNC)
        return self._follow(module, args, {**kwargs, "hidden_states": self.reduced})

    def _follow(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        if self.plan is None:
            return None
        size_BK = self.plan.size.log().to(self.reduced.dtype)
        bias_BL = nn.functional.pad(size_BK, (TEXT_TOKENS, 0))
        more = {"attention_mask": bias_BL[:, None, None]}
        return args, {**kwargs, "image_rotary_emb": None, "joint_attention_kwargs": more}

    def _rotate(self, module: nn.Module, args: tuple, x_BLHd: Tensor) -> Tensor | None:
        if self.plan is None:
            return None
        text, image = x_BLHd[:, : -self.plan.slots], x_BLHd[:, -self.plan.slots :]
        even, odd = image.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-odd, even], -1).flatten(-2)
        # Text is at position 0, where rotation does nothing.
        return torch.cat([text, image * self.cos + turned * self.sin], 1)

    def _leave(self, module: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> Any:
        if self.plan is None:
            return None
        text, y_BKC = output
        return text, self.full + self.plan.expand(y_BKC - self.reduced)


class Model:
    """The frozen transformer of each world, and its predictions dense and, with changed weights, on windows."""

    def __init__(
        self,
        worlds: list[str],
        size: int,
        device: torch.device,
        textures: Path = textured.FILE,
        dtype: torch.dtype | None = None,
    ):
        self.pipes = {world: builtin.load_pipeline(device, dtype) for world in worlds}
        if "textured" in worlds:
            textured.add_to(self.pipes["textured"], textures)
        self.net = self.pipes[worlds[0]].transformer.requires_grad_(False)
        self.fits = [sidecar.fingerprint(pipe.transformer) for pipe in self.pipes.values()]
        self.bases = {world: parameters(pipe.transformer) for world, pipe in self.pipes.items()}
        self.set_times, self.windows = exact_times(self.net), Reduced(self.net)
        self.size, self.grid = size, (size // 8, size // 8)
        self.ids = image_ids(size // 8, str(device))
        self.text_ids = torch.zeros(TEXT_TOKENS, 3, device=device)

    def predict(
        self, weights: dict, x: Tensor, time: Tensor, tokens: Tensor, pooled: Tensor, plan=None
    ) -> Tensor:
        """Velocity (B, N, 16); `time` is a scalar tensor or one per row."""
        times = time.expand(len(x)).float()
        self.set_times(times)
        self.windows.plan = plan
        dtype = self.net.dtype
        inputs = {
            "hidden_states": x.to(dtype),
            "encoder_hidden_states": tokens.to(dtype),
            "pooled_projections": pooled.to(dtype),
            "timestep": times,
            "img_ids": self.ids,
            "txt_ids": self.text_ids,
            "return_dict": False,
        }
        return velocity(self.net, weights, inputs)

    def sigmas(self, steps: int) -> list[float]:
        """Of the pipeline's scheduler at this size, from 1 to 0."""
        shift = math.exp(shift_for(self.size))
        at = torch.linspace(1, 1 / steps, steps).tolist()
        return [shift / (shift + 1 / s - 1) for s in at] + [0.0]

    def plan_of(self, picture: Tensor, budget: float) -> TokenPlan | None:
        counts = windows.counts(self.grid, budget, 16)  # few shapes, and aligned ones
        if counts.slots == counts.tokens:
            return None
        return windows.plan(windows.variance(picture, self.grid), self.grid, counts)


class Student(nn.Module):
    """What is trained: changes of the model's layers, and the decoder behind it."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.low = LowRank(net, rank_of)
        self.decoder = decoder.Decoder(16).to(next(net.parameters()).device)

    def named(self) -> dict[str, Tensor]:
        """The tensors by the names that side-cars give them."""
        return self.low.named() | {decoder.PREFIX + name: p for name, p in self.decoder.named_parameters()}


def guide(both: Tensor) -> Tensor:
    """(2B, ...) conditional and unconditional predictions → (B, ...) guided."""
    conditional, unconditional = both.chunk(2)
    return unconditional + GUIDANCE * (conditional - unconditional)


@dataclass
class Step:
    """A step of a walk, at which the student predicts.

    Attributes:
        world: of `Model.bases`.
        x: (B, N, 16).
        sigma: the noise's share of it.
        features: of the texts, of both branches.
        share: of the tokens that the student is to compute.
        dense: what the dense model predicts there, (2B, N, 16).
        last: the picture that the step before predicted.
        predicted: what the walk goes on with, (B, N, 16); put here by whoever asked for the step.
    """

    world: str
    x: Tensor
    sigma: float
    share: float
    features: tuple[Tensor, Tensor]
    dense: Tensor
    last: Tensor
    predicted: Tensor | None = None


def walks(model: Model, worlds: list[str], batch: int, seed: int, device: torch.device) -> Iterator[Step]:
    """The student's way through the sampler's steps, endlessly: of each walk all steps but the first, which is dense."""
    rng = np.random.default_rng([seed, 4])
    generator = torch.Generator(device).manual_seed(seed)
    tokens_of = model.grid[0] * model.grid[1]
    for turn in range(1_000_000_000):
        world = worlds[turn % len(worlds)]
        pipe, base = model.pipes[world], model.bases[world]
        texts = [*draw_captions(rng, batch, world), *[""] * batch]
        with torch.no_grad():
            features = encode(
                pipe.text_encoder, pipe.text_encoder_2, pipe.tokenizer, pipe.tokenizer_2, texts, device
            )
        x = torch.randn(batch, tokens_of, 16, device=device, generator=generator)
        sigmas, last = model.sigmas(int(rng.choice(STEPS))), None
        walk = zip(itertools.pairwise(sigmas), [1.0, *shares(rng, len(sigmas) - 2)], strict=True)
        for (sigma, following), share in walk:
            with torch.no_grad():
                time = torch.tensor(sigma, device=device)
                dense = model.predict(base, torch.cat([x, x]), time, *features)
            predicted = guide(dense)
            if last is not None:
                step = Step(world, x, sigma, share, features, dense, last)
                yield step
                assert step.predicted is not None
                predicted = step.predicted
            last = x - sigma * predicted
            x = x + (following - sigma) * predicted


def shares(rng: np.random.Generator, count: int) -> list[float]:
    """Of the tokens, at the reduced steps of a walk: falling as `few-step` has them, or the same at all."""
    if rng.random() < 0.3:
        return [0.7] * (count // 2) + [0.4] * (count - count // 2)
    return [0.25 * 2.4 ** float(rng.random())] * count


def distillation(model: Model, student: Student, step: Step) -> Tensor:
    """Mean squared error to the dense model: of what the sampler is given, of every slot's mean in it, which is all that
    a reduced step computes, and of each branch. Leaves `step.predicted`."""
    x, sigma, plan = step.x, step.sigma, model.plan_of(step.last, step.share)
    time, true = torch.tensor(sigma, device=x.device), guide(step.dense)
    weights = student.low.changed(model.bases[step.world])
    both = model.predict(weights, torch.cat([x, x]), time, *step.features, plan.repeat(2) if plan else None)
    loss = 0.1 * (both - step.dense).square().mean()
    predicted = guide(both)
    if plan is not None:
        now = step.last + plan.expand(plan.reduce(x - sigma * predicted - step.last))
        carried = (x - now) / sigma
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            change = student.decoder(step.last, now, carried, plan, sigma, model.grid)
        predicted = carried + change.float()
        loss = loss + 0.5 * plan.expand(plan.reduce(carried - true)).square().mean()
    step.predicted = predicted.detach()
    return loss + (predicted - true).square().mean()


def flow_matching(model: Model, low: LowRank, world: str, data: Iterator, budget: float) -> Tensor:
    """Error of the model alone to the true velocity of rendered scenes, the windows told by the dense model's own
    prediction."""
    latents, tokens, pooled = next(data)
    sigma = float(torch.sigmoid(torch.randn(()) + shift_for(model.size)))
    time = torch.tensor(sigma, device=latents.device)
    noise = torch.randn_like(latents)
    x = latents + sigma * (noise - latents)
    with torch.no_grad():
        dense = model.predict(model.bases[world], x, time, tokens, pooled)
    plan = model.plan_of(x - sigma * dense, budget)
    student = model.predict(low.changed(model.bases[world]), x, time, tokens, pooled, plan)
    return (student - (noise - latents)).square().mean()


class Run:
    """The state of a training run, and its files in `out`."""

    checkpoint, file, kind = "upcycle.pt", "chunking.safetensors", learned.KIND
    metadata: Mapping[str, str] = {"most": str(MOST)}
    kept_rank: int | None = KEPT_RANK
    int8 = True

    def __init__(self, out: Path, model: Model, student: Student | LowRank, rate: float):
        self.out, self.model, self.student, self.rate = out, model, student, rate
        self.parameters = list(student.named().values())
        self.optimizer = torch.optim.AdamW(self.parameters, rate, (0.9, 0.97), weight_decay=0.0)
        self.average = [p.detach().clone() for p in self.parameters]
        self.step, self.seconds = 0, 0.0
        if (out / self.checkpoint).exists():
            saved = torch.load(out / self.checkpoint, weights_only=True)
            student.load_state_dict(saved["student"])
            self.optimizer.load_state_dict(saved["optimizer"])
            for mean, value in zip(self.average, saved["average"], strict=True):
                mean.copy_(value)
            self.step, self.seconds = saved["step"], saved["seconds"]
            print(f"resumed at step {self.step}, {self.seconds:.0f} s", flush=True)

    def update(self, loss: Tensor, progress: float, accelerator: Accelerator) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(1, (self.step + 1) / 20) * (1.05 - min(1, progress))
        self.optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        for p in self.parameters:  # the changed weights are formed outside of a wrapped forward
            if accelerator.num_processes > 1 and p.grad is not None:
                p.grad = accelerator.reduce(p.grad, "mean")
        for part in self.student.children():
            nn.utils.clip_grad_norm_(part.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.step += 1
        keep = min(0.99, self.step / (10 + self.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - keep)

    def save(self) -> int:
        state = {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
            "seconds": self.seconds,
        }
        part = (self.out / self.checkpoint).with_suffix(".part")
        torch.save(state, part)
        part.replace(self.out / self.checkpoint)
        named = dict(zip(self.student.named(), self.average, strict=True))
        if self.kept_rank:
            named = truncated(named, self.kept_rank)
        size = sidecar.write(
            self.out / self.file, self.kind, self.model.fits, named, int8=self.int8, **self.metadata
        )
        assert size <= LIMIT, f"{size} bytes: lower the ranks"
        return size


@torch.no_grad()
def load(student: Student, path: Path) -> None:
    """Go on from an earlier side-car, with its decoder if it has one."""
    car = sidecar.read(path, learned.KIND)
    pairs = {
        f"{layer}.{part}": t for layer, ab in car.layers.items() for part, t in zip("AB", ab, strict=True)
    }
    student.low.load(pairs | {f"{layer}.bias": bias for layer, bias in car.biases.items()})
    net = decoder.of(car)
    if net is not None:
        student.decoder.load_state_dict(net.state_dict())


def train(run: Run, args: argparse.Namespace, accelerator: Accelerator, workers: Workers) -> None:
    model, student, device = run.model, run.student, accelerator.device
    seed = 1000 * accelerator.process_index + run.step
    states = walks(model, args.worlds, args.batch, seed, device)
    rng = np.random.default_rng([seed, 5])
    flow_from = args.seconds * (1 - args.flow_share)
    pictures: dict[str, Iterator] = {}
    saved_at, last, losses = time.time(), time.time(), []
    while run.seconds < args.seconds:
        if run.seconds < flow_from:
            loss = distillation(model, student, next(states))
        else:
            world = args.worlds[run.step % len(args.worlds)]
            if world not in pictures:
                data = Latents(workers, model.pipes[world], world, seed, 8 * args.batch, 4)
                pictures[world] = data.batches(args.size, args.batch)
            loss = flow_matching(model, student.low, world, pictures[world], 0.25 ** float(rng.random()))
        run.update(loss, run.seconds / args.seconds, accelerator)
        losses.append(loss.detach())
        if run.step % args.log == 0:
            mean = torch.stack(losses).mean().item()  # the one wait for the device
            now = time.time()
            # The first process's clock, for all: they end, and go over to flow matching, at the same step.
            (run.seconds,) = broadcast_object_list([run.seconds + now - last])
            last, losses = now, []
            accelerator.print(f"upcycle step {run.step} loss {mean:.5f} {run.seconds:.0f} s", flush=True)
            if now - saved_at > EVERY and accelerator.is_main_process:
                run.save()
                saved_at = time.time()
    if accelerator.is_main_process:
        print(f"side-car: {run.save()} bytes", flush=True)


def report(args: argparse.Namespace, device: torch.device, dtype: torch.dtype | None) -> None:
    """What the side-car is worth under accel's own hooks: distances to the plain pictures, and scores."""
    names = [f"{name}:{share}" for share in (0.5, 0.67, 0.75) for name in ("windows", "upcycled")]
    prompts = prompts_of("tasks", args.report, args.seed)
    for world in args.worlds:
        pipe = builtin.load_pipeline(device, dtype)
        if world == "textured":
            textured.add_to(pipe, args.textures)
        print(f"{world}, 4 steps, {len(prompts)} prompts", flush=True)
        rows(pipe, ["plain", *names], prompts, 4, args.out / "chunking.safetensors", args.size)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint and side-car")
    parser.add_argument("--seconds", type=float, required=True, help="of training, all calls together")
    parser.add_argument("--worlds", nargs="+", default=["flat", "textured"])
    parser.add_argument("--textures", type=Path, default=textured.FILE, help="the textured world's side-car")
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument(
        "--batch", type=int, help="captions in a walk, both branches each; default 32, 1 on CPU"
    )
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument(
        "--flow-share", type=float, default=0.0, help="of the time, at the end: flow matching"
    )
    parser.add_argument("--workers", type=int, default=2, help="threads that draw scenes")
    parser.add_argument("--plain", action="store_true", help="float32 (TF32) and attention as two matmuls")
    parser.add_argument("--log", type=int, default=10, help="steps between lines")
    parser.add_argument("--report", type=int, default=4, help="prompts of each task, at the end; 0: none")
    parser.add_argument("--seed", type=int, default=12, help="of those prompts")
    parser.add_argument("--start", type=Path, help="an earlier side-car to go on from")
    args = parser.parse_args()
    workers = Workers(args.workers if args.flow_share else 0)
    dtype = safe_backends(args.plain)
    accelerator = Accelerator()
    args.batch = args.batch or (32 if accelerator.device.type == "cuda" else 1)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = Model(args.worlds, args.size, accelerator.device, args.textures, dtype)
    student = Student(model.net)
    if args.start:
        load(student, args.start)
    run = Run(args.out, model, student, args.rate)
    train(run, args, accelerator, workers)
    workers.close()
    if args.report and accelerator.is_main_process:
        report(args, accelerator.device, dtype)


if __name__ == "__main__":
    main()
