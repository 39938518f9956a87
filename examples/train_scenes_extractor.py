"""Train the small network whose features compare sets of scenes (FID, KID on the built-in world).

    python examples/train_scenes_extractor.py                    # some ten CPU-minutes on one thread
    python examples/train_scenes_extractor.py --images 5000      # a quick trial

It learns to tell, from 32 numbers, which of the 80 shape-colour pairs a picture shows, how many of each
shape and colour, where objects are, and by how much it was blurred, made noisy, bent, brightened or
stained: generated pictures fail in both what they show and how clean it is, and features that know only
clean renders would not notice the latter. Scenes are rendered on the fly, none is seen twice. Writes the
weights and a JSON card with recipe, loss curve, held-out scores, and the distances that the features give
to sets that were spoilt on purpose.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from accel.evaluation.extractors.scenes import FEATURES, SIZE, WEIGHTS, ScenesExtractor, ScenesNet
from accel.evaluation.metrics import FrechetDistance, kernel_inception_distance
from accel.evaluation.scenes import COLOR_NAMES, SHAPES, Scenes, prompts, render, sample_scenes
from accel.evaluation.weights import fingerprint

POOL = 600  # prompts per task to draw scenes from; the scenes themselves are new every time
CELLS = 4  # objects are located on a grid of 4 x 4 cells
TASKS = {"pairs": len(SHAPES) * len(COLOR_NAMES), "cells": CELLS**2, "counts": len(SHAPES) + len(COLOR_NAMES)}
DEGRADATIONS = ("blur", "noise", "bend", "brightness", "stains")


class Heads(nn.Module):
    """Features -> every label. Only for training: the features are standardised here, and the
    normalisation is folded into the network at the end, so that each has unit variance."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES, affine=False)
        sizes = {**TASKS, "degradations": len(DEGRADATIONS)}
        self.hidden = nn.Sequential(nn.Linear(FEATURES, 256), nn.SiLU())
        self.out = nn.ModuleDict({name: nn.Linear(256, size) for name, size in sizes.items()})

    def forward(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.hidden(self.norm(features))
        return {name: layer(x) for name, layer in self.out.items()}


def labels(scenes: Scenes) -> dict[str, torch.Tensor]:
    """What a batch of scenes shows: `pairs` (B, 80) and `cells` (B, 16) as 0/1, `counts` (B, 18)."""
    target = {name: torch.zeros(len(scenes), size) for name, size in TASKS.items()}
    image, slot = (scenes.shape_BM >= 0).nonzero(as_tuple=True)
    shape, color = scenes.shape_BM[image, slot], scenes.color_BM[image, slot]
    column, row = (scenes.center_BM2[image, slot] * CELLS).long().clamp(0, CELLS - 1).unbind(1)
    target["pairs"][image, shape * len(COLOR_NAMES) + color] = 1
    target["cells"][image, row * CELLS + column] = 1
    one = torch.ones(len(image))
    target["counts"].index_put_((image, shape), one, accumulate=True)
    target["counts"].index_put_((image, len(SHAPES) + color), one, accumulate=True)
    return target


def batch(lines: list, size: int, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Pictures (B, 3, 128, 128) in [0, 1] and their labels."""
    scenes = sample_scenes([lines[i] for i in rng.integers(len(lines), size=size)], rng)
    images = torch.cat([render(scenes[i : i + 8], SIZE) for i in range(0, size, 8)])  # 8: stays in the cache
    # As soft as a picture of 256 pixels that the extractor brings to 128.
    return blur(images, torch.full((size,), 0.5)), labels(scenes)


def degrade(images: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Each degradation on a quarter of the pictures, and by how much: (B, 5), 0 for none, up to 1."""
    amount = torch.rand(len(images), len(DEGRADATIONS), generator=generator)
    amount *= torch.rand(amount.shape, generator=generator) < 0.25
    out = images.clone()
    for column, spoil in enumerate(SPOIL.values()):
        chosen = amount[:, column].nonzero()[:, 0]
        if len(chosen):
            out[chosen] = spoil(out[chosen], amount[chosen, column], generator).clamp_(0, 1)
    return out, amount


def blur(images: torch.Tensor, sigma_B: torch.Tensor) -> torch.Tensor:
    """Gaussian blur, of each picture by its own sigma in pixels."""
    reach = math.ceil(3 * float(sigma_B.max()))
    at = torch.arange(-reach, reach + 1)
    kernel = torch.exp(-(at**2) / (2 * sigma_B.clamp(min=1e-3)[:, None] ** 2))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)
    flat = F.pad(images, (reach,) * 4, mode="replicate").flatten(0, 1)[None]
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=len(kernel))
    return F.conv2d(flat, kernel[:, None, :, None], groups=len(kernel))[0].view_as(images)


def _blur(images: torch.Tensor, amount: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return blur(images, 0.4 + 2.1 * amount)


def _noise(images: torch.Tensor, amount: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Grainy at the pixels for half of the pictures, at twice their size for the others."""
    noise = torch.randn(images.shape, generator=generator)
    coarse = F.interpolate(noise[:, :, ::2, ::2], scale_factor=2, mode="bilinear")
    fine = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return images + 0.12 * amount[:, None, None, None] * torch.where(fine, noise, coarse)


def _bend(images: torch.Tensor, amount: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A smooth random displacement, strong enough to spoil a shape."""
    shift = torch.randn(len(images), 2, 9, 9, generator=generator) * 0.06 * amount[:, None, None, None]
    shift = F.interpolate(shift, images.shape[-2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    identity = torch.eye(2, 3).expand(len(images), 2, 3)
    grid = F.affine_grid(identity, list(images.shape), align_corners=False) + shift
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _brightness(images: torch.Tensor, amount: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    sign = torch.randint(0, 2, (len(images), 1, 1, 1), generator=generator) * 2 - 1
    return images + 0.15 * sign * amount[:, None, None, None]


def _stains(images: torch.Tensor, amount: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One to four soft spots of any colour."""
    place = torch.rand(len(images), 4, 2, 1, 1, generator=generator)
    radius = 0.03 + 0.07 * torch.rand(len(images), 4, 1, 1, generator=generator)
    color = torch.rand(len(images), 4, 3, 1, 1, generator=generator)
    at = (torch.arange(images.shape[-1]) + 0.5) / images.shape[-1]
    for number in range(4):
        x, y = at[None, None] - place[:, number, 0], at[None, :, None] - place[:, number, 1]
        cover = torch.sigmoid((radius[:, number] - torch.hypot(x, y)) / 0.012)[:, None]
        cover = cover * (amount * 4 > number)[:, None, None, None]
        images = images + cover * (color[:, number] - images)
    return images


SPOIL = dict(zip(DEGRADATIONS, (_blur, _noise, _bend, _brightness, _stains), strict=True))


def loss_of(said: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum over labels, mean over pictures; the terms are of one size by themselves."""
    loss = sum(
        F.binary_cross_entropy_with_logits(said[n], target[n], reduction="sum") for n in ("pairs", "cells")
    )
    loss = loss + F.mse_loss(said["counts"], target["counts"], reduction="sum")
    loss = loss + 10 * F.mse_loss(said["degradations"], target["degradations"], reduction="sum")
    return loss / len(target["pairs"])


def train(args: argparse.Namespace) -> tuple[ScenesNet, Heads, list[tuple[int, float]]]:
    torch.manual_seed(args.seed)
    rng, generator = np.random.default_rng(args.seed), torch.Generator().manual_seed(args.seed)
    lines = prompts("train", POOL, args.seed)
    net, heads = ScenesNet().to(args.device), Heads().to(args.device)
    parameters = [*net.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=1e-4)
    steps = max(2, args.images // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps, pct_start=0.1)
    curve: list[tuple[int, float]] = []
    recent: list[float] = []
    start = time.process_time()
    for step in range(1, steps + 1):
        images, target = batch(lines, args.batch_size, rng)
        images, target["degradations"] = degrade(images, generator)
        target = {name: tensor.to(args.device) for name, tensor in target.items()}
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
            features = net(images.to(args.device))
        loss = loss_of(heads(features.float()), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        schedule.step()
        recent.append(float(loss.detach()))
        if step % 50 == 0 or step == steps:
            curve.append((step, round(sum(recent) / len(recent), 3)))
            recent.clear()
            spent = time.process_time() - start
            print(f"step {step}/{steps}  loss {curve[-1][1]:.2f}  {spent:.0f} CPU-s", flush=True)
    return net, heads, curve


def fold(net: ScenesNet, heads: Heads) -> None:
    """Move the standardisation of the features from the heads into the network, and round to fp16."""
    mean, std = heads.norm.running_mean, (heads.norm.running_var + heads.norm.eps).sqrt()
    with torch.no_grad():
        net.project.weight /= std[:, None]
        net.project.bias.copy_((net.project.bias - mean) / std)
    heads.norm.reset_running_stats()
    net.half().float()  # half precision is what is stored, so it is what is judged


@torch.inference_mode()
def held_out(net: ScenesNet, heads: Heads, device: str, images: int = 1024) -> dict[str, float]:
    """On combinations never trained on, half of the degradations included."""
    rng, generator = np.random.default_rng(123), torch.Generator().manual_seed(123)
    lines = prompts("test", 100, 1)
    said, target = [], []
    for _ in range(images // 128):
        pictures, truth = batch(lines, 128, rng)
        pictures, truth["degradations"] = degrade(pictures, generator)
        said.append({name: value.cpu() for name, value in heads(net(pictures.to(device))).items()})
        target.append(truth)
    guess, truth = ({n: torch.cat([part[n] for part in parts]) for n in parts[0]} for parts in (said, target))
    found, there = guess["pairs"] > 0, truth["pairs"] > 0
    scores = {
        "pair_precision": float((found & there).sum() / found.sum().clamp(min=1)),
        "pair_recall": float((found & there).sum() / there.sum()),
        "cells_right": float(((guess["cells"] > 0) == (truth["cells"] > 0)).float().mean()),
        "counts_right": float((guess["counts"].round() == truth["counts"]).float().mean()),
    }
    for column, name in enumerate(DEGRADATIONS):
        error = (guess["degradations"] - truth["degradations"])[:, column].square().mean()
        scores[f"{name}_r2"] = float(1 - error / truth["degradations"][:, column].var())
    return {name: round(value, 4) for name, value in scores.items()} | {"images": images}


def behaviour(extractor: ScenesExtractor, images: int = 256) -> dict[str, dict[str, float]]:
    """FID and KID from ground truth to ground truth and to sets spoilt step by step, n a side each."""
    generator = torch.Generator().manual_seed(7)

    def scenes(seed: int) -> Scenes:
        lines = prompts("test", -(-images // 6), seed)[:images]
        return sample_scenes(lines, np.random.default_rng(seed))

    def features(drawn: Scenes, change: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> torch.Tensor:
        parts = [change(render(drawn[i : i + 16], 256)).clamp(0, 1) for i in range(0, len(drawn), 16)]
        return torch.cat([extractor((part * 255).round().to(torch.uint8)) for part in parts])

    def wrong(share: float) -> Scenes:
        objects = other.shape_BM >= 0
        chosen = objects & (torch.rand(objects.shape, generator=generator) < share)
        return dataclasses.replace(
            other, shape_BM=torch.where(chosen, SHAPES.index("circle"), other.shape_BM)
        )

    reference, other = features(scenes(11)), scenes(12)
    sets = {"ground truth": features(other)}
    for sigma in (1, 2, 4):
        sets[f"blur of {sigma} px"] = features(
            other, lambda x, s=sigma: blur(x, torch.full((len(x),), float(s)))
        )
    for std in (0.03, 0.06, 0.12):
        sets[f"noise of {std}"] = features(
            other, lambda x, s=std: x + s * torch.randn(x.shape, generator=generator)
        )
    for share in (0.25, 0.5, 1.0):
        sets[f"{share:.0%} of the objects circles"] = features(wrong(share))
    result = {}
    for name, found in sets.items():
        fid = FrechetDistance()
        fid.update(reference, reference=True)
        fid.update(found, reference=False)
        kid = kernel_inception_distance(reference.numpy(), found.numpy()).value
        result[name] = {"fid": round(fid.compute(), 3), "kid": round(kid, 4)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000, help="scenes to train on")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 where the processor is faster with it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()

    net, heads, curve = train(args)
    net.eval()
    heads.eval()
    fold(net, heads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu().half() for name, tensor in net.state_dict().items()}, args.out)
    args.out.chmod(0o644)  # safetensors writes 0600, which a package must not carry
    card = {
        "purpose": "features for distances between sets of scenes; not comparable to Inception's FID",
        "recipe": {name: str(value) for name, value in vars(args).items() if name != "out"},
        "torch": str(torch.__version__),
        "fingerprint": fingerprint(net),
        "parameters": sum(p.numel() for p in net.parameters()),
        "held_out": held_out(net, heads, args.device),
        "distance_from_256_ground_truth_pictures": behaviour(ScenesExtractor(args.out, device=args.device)),
        "loss_curve": curve,
    }
    args.out.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps({key: value for key, value in card.items() if key != "loss_curve"}, indent=2))


if __name__ == "__main__":
    main()
