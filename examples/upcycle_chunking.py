"""Upcycle the built-in diffusion model to few tokens: low-rank changes that make windows cost less quality.

    python examples/upcycle_chunking.py --out runs/upcycled --seconds 3600            # CPU or GPU, resumable
    accelerate launch examples/upcycle_chunking.py --out runs/upcycled --seconds 600

As DC-DiT (arXiv:2603.06351) upcycles a pretrained transformer: distilled from the dense model, then flow matching
(`--flow-share`), with the budget drawn anew for every batch, so that one checkpoint serves all of 25 to 100 %. What is
different here: which tokens share a slot is told by windows (`accel.methods.windows`), and what is trained is the model
at reduced tokens, not a router.

Distillation needs no pictures: captions are drawn, the frozen dense model walks the sampler's own steps with guidance,
and at each step but the first the student, on the windows that the step before tells, is to predict what the dense
model predicts. Its error is weighed per branch and as guidance adds the branches up. The student is the frozen model
with changed weights; at dense steps the changes are off, so that those stay exact. What it is worth is measured at the
end under accel's own hooks, on prompts of the test set.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from low_rank import LowRank, exact_times, parameters, safe_backends, velocity
from scenes_latents import Latents, Workers, draw_captions
from scenes_scores import prompts_of, rows
from scenes_text import encode
from torch import Tensor, nn
from train_scenes_diffusion import image_ids

from accel.core import sidecar
from accel.core.plan import TokenPlan
from accel.methods import learned, windows
from accel.pipelines import builtin
from accel.pipelines.builtin import textured
from accel.pipelines.builtin.architecture import TEXT_TOKENS, shift_for

LIMIT = 4_000_000  # bytes
EVERY = 20  # seconds between checkpoints
GUIDANCE = 3.0
STEPS = (4, 4, 6, 8, 8, 12)  # of the walks; one is drawn for each


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

    def plan_of(self, x: Tensor, sigma: float, guided: Tensor, budget: float) -> TokenPlan | None:
        counts = windows.counts(self.grid, budget, 16)  # few shapes, and aligned ones
        if counts.slots == counts.tokens:
            return None
        return windows.plan(windows.variance(x - sigma * guided, self.grid), self.grid, counts)


def guide(both: Tensor) -> Tensor:
    """(2B, ...) conditional and unconditional predictions → (B, ...) guided."""
    conditional, unconditional = both.chunk(2)
    return unconditional + GUIDANCE * (conditional - unconditional)


def walks(model: Model, worlds: list[str], batch: int, seed: int, device: torch.device) -> Iterator[tuple]:
    """The dense model's way through the sampler's steps, endlessly: (world, x (B, N, 16), sigma, text features of both
    branches, the dense prediction (2B, N, 16), last guided prediction, its x and sigma)."""
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
        for sigma, following in itertools.pairwise(sigmas):
            with torch.no_grad():
                time = torch.tensor(sigma, device=device)
                dense = model.predict(base, torch.cat([x, x]), time, *features)
            if last is not None:
                yield world, x, time, features, dense, last
            last = (guide(dense), x, sigma)
            x = x + (following - sigma) * last[0]


def distillation(model: Model, low: LowRank, state: tuple, budget: float) -> Tensor:
    """Mean squared error of the student to the dense model: of each branch, of the guided sum, and of every slot's mean,
    which is all that `carry` takes from a reduced step."""
    world, x, time, features, dense, (guided, before, sigma) = state
    plan = model.plan_of(before, sigma, guided, budget)
    both = plan.repeat(2) if plan else None
    student = model.predict(low.changed(model.bases[world]), torch.cat([x, x]), time, *features, both)
    error = student - dense
    added = guide(error)
    loss = error.square().mean() + 0.25 * added.square().mean()
    if plan is not None:
        loss = loss + 0.25 * plan.expand(plan.reduce(added)).square().mean()
    return loss


def flow_matching(model: Model, low: LowRank, world: str, data: Iterator, budget: float) -> Tensor:
    """Error to the true velocity of rendered scenes, the windows told by the dense model's own prediction."""
    latents, tokens, pooled = next(data)
    sigma = float(torch.sigmoid(torch.randn(()) + shift_for(model.size)))
    time = torch.tensor(sigma, device=latents.device)
    noise = torch.randn_like(latents)
    x = latents + sigma * (noise - latents)
    with torch.no_grad():
        dense = model.predict(model.bases[world], x, time, tokens, pooled)
    plan = model.plan_of(x, sigma, dense, budget)
    student = model.predict(low.changed(model.bases[world]), x, time, tokens, pooled, plan)
    return (student - (noise - latents)).square().mean()


class Run:
    """The state of a training run, and its files in `out`."""

    checkpoint, file, kind = "upcycle.pt", "chunking.safetensors", learned.KIND

    def __init__(self, out: Path, model: Model, low: LowRank, rate: float):
        self.out, self.model, self.low, self.rate = out, model, low, rate
        self.optimizer = torch.optim.AdamW(low.parameters(), rate, (0.9, 0.97), weight_decay=0.0)
        self.average = [p.detach().clone() for p in low.parameters()]
        self.step, self.seconds = 0, 0.0
        if (out / self.checkpoint).exists():
            saved = torch.load(out / self.checkpoint, weights_only=True)
            low.load_state_dict(saved["low"])
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
        for p in self.low.parameters():  # the changed weights are formed outside of a wrapped forward
            if accelerator.num_processes > 1:
                p.grad = accelerator.reduce(p.grad, "mean")
        nn.utils.clip_grad_norm_(self.low.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.step += 1
        keep = min(0.99, self.step / (10 + self.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.low.parameters()], 1 - keep)

    def save(self) -> int:
        state = {
            "low": self.low.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
            "seconds": self.seconds,
        }
        part = (self.out / self.checkpoint).with_suffix(".part")
        torch.save(state, part)
        part.replace(self.out / self.checkpoint)
        named = dict(zip(self.low.named(), self.average, strict=True))
        size = sidecar.write(self.out / self.file, self.kind, self.model.fits, named)
        assert size <= LIMIT, f"{size} bytes: lower the ranks"
        return size


def load(low: LowRank, path: Path) -> None:
    car = sidecar.read(path, learned.KIND)
    pairs = {
        f"{layer}.{part}": t for layer, ab in car.layers.items() for part, t in zip("AB", ab, strict=True)
    }
    low.load(pairs | {f"{layer}.bias": bias for layer, bias in car.biases.items()})


def train(run: Run, args: argparse.Namespace, accelerator: Accelerator, workers: Workers) -> None:
    model, low, device = run.model, run.low, accelerator.device
    seed = 1000 * accelerator.process_index + run.step
    states = walks(model, args.worlds, args.batch, seed, device)
    rng = np.random.default_rng([seed, 5])
    flow_from = args.seconds * (1 - args.flow_share)
    pictures: dict[str, Iterator] = {}
    saved_at, last, losses = time.time(), time.time(), []
    while run.seconds < args.seconds:
        budget = 0.25 ** float(rng.random())
        if run.seconds < flow_from:
            loss = distillation(model, low, next(states), budget)
        else:
            world = args.worlds[run.step % len(args.worlds)]
            if world not in pictures:
                data = Latents(workers, model.pipes[world], world, seed, 8 * args.batch, 4)
                pictures[world] = data.batches(args.size, args.batch)
            loss = flow_matching(model, low, world, pictures[world], budget)
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
    low = LowRank(model.net, rank_of)
    if args.start:
        load(low, args.start)
    run = Run(args.out, model, low, args.rate)
    train(run, args, accelerator, workers)
    workers.close()
    if args.report and accelerator.is_main_process:
        report(args, accelerator.device, dtype)


if __name__ == "__main__":
    main()
