"""Train the small network whose features compare sets of scenes (FID, KID on the built-in world).

    python examples/train_scenes_extractor.py                    # about 45 CPU-minutes, less with a GPU
    python examples/train_scenes_extractor.py --images 20000     # a quick trial

The task is multi-label: which of the 80 shape-colour pairs are in the picture. Scenes are rendered on
the fly, none is seen twice. Half of the pictures are slightly blurred, shifted in brightness or noisy,
because generated pictures are, and features that only know clean renders would see nothing else in
them. Writes the weights and a JSON card with recipe, loss curve and held-out score beside them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from accel.evaluation.extractors.scenes import SIZE, WEIGHTS, ScenesNet
from accel.evaluation.scenes import COLOR_NAMES, SHAPES, prompts, render, sample_scenes
from accel.evaluation.weights import fingerprint

PAIRS = len(SHAPES) * len(COLOR_NAMES)
POOL = 600  # prompts per task to draw scenes from; the scenes themselves are new every time


def batch(lines: list, size: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (B, 3, 64, 64) in [0, 1] and which pairs they show, (B, 80)."""
    scenes = sample_scenes([lines[i] for i in rng.integers(len(lines), size=size)], rng)
    targets = torch.zeros(size, PAIRS)
    image, slot = (scenes.shape_BM >= 0).nonzero(as_tuple=True)
    targets[image, scenes.shape_BM[image, slot] * len(COLOR_NAMES) + scenes.color_BM[image, slot]] = 1
    return render(scenes, SIZE), targets


def degrade(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blur, brightness and noise on half of the pictures."""
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    strength = torch.rand(len(images), 1, 1, 1, generator=generator)
    noise = 0.06 * torch.randn(images.shape, generator=generator)
    brightness = 0.1 * (torch.rand(len(images), 1, 1, 1, generator=generator) - 0.5)
    worse = (images + strength * (blurred - images) + strength * noise + brightness).clamp(0, 1)
    chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(chosen, worse, images)


@torch.inference_mode()
def held_out_score(net: ScenesNet, device: str, images: int = 1024) -> dict[str, float]:
    """Precision and recall of pairs, at a probability of one half, on combinations never trained on."""
    rng = np.random.default_rng(123)
    lines = prompts("test", 100, 1)
    hit = said = there = 0
    for _ in range(images // 128):
        pictures, targets = batch(lines, 128, rng)
        guess = (net(pictures.to(device)) > 0).cpu()
        hit += int((guess & (targets > 0)).sum())
        said += int(guess.sum())
        there += int(targets.sum())
    return {"precision": hit / max(said, 1), "recall": hit / there, "images": images}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256_000, help="scenes to train on")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng, generator = np.random.default_rng(args.seed), torch.Generator().manual_seed(args.seed)
    lines = prompts("train", POOL, args.seed)
    net = ScenesNet(outputs=PAIRS).to(args.device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, weight_decay=1e-4)
    steps = max(1, args.images // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps, pct_start=0.1)
    curve: list[tuple[int, float]] = []
    recent: list[float] = []
    start = time.perf_counter()
    for step in range(1, steps + 1):
        images, targets = batch(lines, args.batch_size, rng)
        logits = net(degrade(images, generator).to(args.device))
        loss = F.binary_cross_entropy_with_logits(logits, targets.to(args.device), reduction="sum")
        loss = loss / len(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        recent.append(float(loss.detach()))
        if step % 100 == 0 or step == steps:
            curve.append((step, round(sum(recent) / len(recent), 4)))
            recent.clear()
            print(
                f"step {step}/{steps}  loss {curve[-1][1]:.3f}  {time.perf_counter() - start:.0f} s",
                flush=True,
            )

    net.eval().half().float()  # half precision is what is stored, so it is what is judged
    score = held_out_score(net, args.device)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu().half() for name, tensor in net.state_dict().items()}, args.out)
    args.out.chmod(0o644)  # safetensors writes 0600, which a package must not carry
    card = {
        "purpose": "features for distances between sets of scenes; not comparable to Inception's FID",
        "recipe": {name: str(value) for name, value in vars(args).items() if name != "out"},
        "torch": str(torch.__version__),
        "fingerprint": fingerprint(net),
        "held_out": score,
        "loss_curve": curve,
    }
    args.out.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n")
    print(f"{args.out}: {score}")


if __name__ == "__main__":
    main()
