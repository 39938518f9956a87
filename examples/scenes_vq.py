"""The image tokenizer of the built-in autoregressive model, for train_scenes_ar.py.

Learning codes, encoder and decoder together takes thousands of steps before a first usable token. Patches of
Scenes are simple enough to go the other way round: the codes are k-means centres of 8x8 px patches, which takes a
minute and fixes what every token means; then encoder and decoder of the `JanusVQVAE` learn to name and to paint
them, at any time, without a change to what the token model learns.

Legend: B images, P patches, F features of a patch, K codes, D dimensions of a code.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from batched_muon import BatchedMuon
from scenes_data import captions
from torch import nn

from accel.evaluation.geneval.metadata import Metadata
from accel.evaluation.geneval.scorer import score
from accel.evaluation.scenes import Scenes, detect, prompts, render, sample_scenes
from accel.evaluation.scenes.render import object_coverage
from accel.pipelines.builtin.janus_architecture import CODE_DIM, CODES, GRID, SIZE, build_vq

PATCH = SIZE // GRID
FEATURES = 48  # principal components of a patch's 192 numbers
# Grounds fill more than half of an image and say nothing that a caption asks for. With a share of the codes of
# their own, the token model does not spend itself on their texture.
GROUND_CODES = 16


class PatchCodes:
    """What every token stands for.

    Attributes:
        mean (192,), basis (192, F): patch → features.
        centers_KF: the patch each code stands for, as features.
        codes_KD: unit vectors, close where patches look alike; the codebook of the VQ model.
    """

    def __init__(self, mean, basis, centers_KF, codes_KD):
        self.mean, self.basis, self.centers_KF = mean, basis, centers_KF
        self.codes_KD = codes_KD

    @classmethod
    def fit(cls, rng: np.random.Generator, images: int = 4096) -> PatchCodes:
        """k-means of patches with objects, and of grounds."""
        objects, grounds = [], []
        for _ in range(images // 64):
            scenes = sample_scenes(captions(rng, 64), rng)
            patches, filled = _patches(render(scenes, SIZE)), _filled(scenes)
            objects.append(patches[filled > 0.15])
            ground = patches[filled <= 0.15]
            grounds.append(ground[torch.from_numpy(rng.permutation(len(ground))[:500])])
        drawn, plain = torch.cat(objects), torch.cat(grounds)
        mean = drawn.mean(0)
        basis = torch.pca_lowrank(drawn - mean, FEATURES, center=False, niter=3)[2]
        centers = [
            _kmeans((drawn - mean) @ basis, CODES - GROUND_CODES, rng),
            _kmeans((plain - mean) @ basis, GROUND_CODES, rng),
        ]
        centers_KF = torch.cat(centers)
        return cls(mean, basis, centers_KF, _lay_out(centers_KF))

    def state(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in ("mean", "basis", "centers_KF", "codes_KD")}

    def to(self, device: str) -> PatchCodes:
        return PatchCodes(**{name: value.to(device) for name, value in self.state().items()})

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] → (B, patches) int64, row by row."""
        return _nearest((_patches(images) - self.mean) @ self.basis, self.centers_KF)[1]


def _patches(images: torch.Tensor) -> torch.Tensor:
    return F.unfold(images, PATCH, stride=PATCH).mT


def _filled(scenes: Scenes) -> torch.Tensor:
    """(B, patches): how much of a patch's fullest pixel an object covers."""
    image, _, cover = object_coverage(scenes, SIZE)
    shares = cover.new_zeros(len(scenes), SIZE, SIZE).index_add_(0, image, cover)
    return F.max_pool2d(shares[:, None], PATCH).flatten(1)


def _nearest(features: torch.Tensor, centers_KF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(squared distance less the feature's own square, index) of the nearest centre."""
    distance, index = ((centers_KF * centers_KF).sum(1) - 2 * features @ centers_KF.T).min(-1)
    return distance, index


def _kmeans(x_PF: torch.Tensor, k: int, rng: np.random.Generator, rounds: int = 12) -> torch.Tensor:
    """Lloyd's algorithm; centres of fewer than four patches restart at patches that are represented badly."""
    centers = x_PF[torch.from_numpy(rng.permutation(len(x_PF))[:k])].clone()
    for left in reversed(range(rounds)):
        distance, index = _nearest(x_PF, centers)
        counts = torch.bincount(index, minlength=k)
        sums = torch.zeros_like(centers).index_add_(0, index, x_PF)
        centers = sums / counts.clamp(min=1)[:, None]
        if left and len(few := (counts < 4).nonzero()[:, 0]):
            error = ((x_PF * x_PF).sum(1) + distance).clamp(min=1e-6).double().numpy()
            centers[few] = x_PF[rng.choice(len(x_PF), len(few), p=error / error.sum())]
    return centers


def _lay_out(centers_KF: torch.Tensor, neighbours: int = 32, steps: int = 300) -> torch.Tensor:
    """Unit vectors (K, D), patches that look alike close together, but no two so close that bfloat16 or the
    encoder would mix them up: stochastic neighbour embedding (Hinton & Roweis 2002) on a sphere, with repulsion
    twice as strong. Nine in ten of a code's five neighbours are among its centre's nearest ten; no cosine
    exceeds 0.8.
    """
    wide, reach = torch.cdist(centers_KF, centers_KF).square().fill_diagonal_(torch.inf), 0.3
    scale = wide.topk(neighbours, largest=False).values[:, -1:] / 3
    near = torch.softmax(-wide / scale, 1)
    near = (near + near.T) / (2 * len(near))
    itself = torch.eye(len(near)) * 1e9
    start = centers_KF[:, :CODE_DIM] / centers_KF[:, :CODE_DIM].std(0)
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(0))
    points = F.normalize(start + 0.1 * noise, dim=1).requires_grad_()
    optimizer = torch.optim.Adam([points], 0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        unit = F.normalize(points, dim=1)
        closeness = 2 * (unit @ unit.T - 1) / reach - itself
        loss = torch.logsumexp(closeness.flatten(), 0) - 0.5 * (near * closeness).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return F.normalize(points.detach(), dim=1)


def save_atomically(state: dict, path: Path) -> None:
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.rename(path)


def load_codes(folder: Path, seed: int) -> PatchCodes:
    """The codes of `folder/codes.pt`, which is made if it is not there."""
    path = folder / "codes.pt"
    if not path.exists():
        save_atomically(PatchCodes.fit(np.random.default_rng([seed, 0])).state(), path)
    return PatchCodes(**torch.load(path, weights_only=True))


def objective(vq: nn.Module, images: torch.Tensor, wanted: torch.Tensor):
    """Images in [-1, 1] and their codes (B, D, h, w). Returns (loss, squared error, encoder's vectors)."""
    with torch.autocast(images.device.type, torch.bfloat16):
        vectors = vq.quant_conv(vq.encoder(images)).float()
        output = vq.decoder(vq.post_quant_conv(wanted)).float()
    named = (F.normalize(vectors, dim=1) - wanted).square().sum(1).mean()
    error = output - images
    # Edges are few pixels and all of the shape: the error of differences weighs them up.
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (
        error[..., 1:, :] - error[..., :-1, :]
    ).abs().mean()
    square = error.square().mean()
    return error.abs().mean() + square + edges + named, square, vectors.detach()


def draw_crops(
    rng: np.random.Generator, codes: PatchCodes, count: int, crops: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` images in [-1, 1] and their tokens as a grid; with `crops`, four quarters of which one in four is
    kept, so that a step sees four times as many scenes for the same work."""
    images = render(sample_scenes(captions(rng, count), rng).to(device), SIZE)
    tokens = codes.tokens(images).view(count, GRID, GRID)
    if crops:
        half, rows = GRID // 2, torch.arange(count, device=device)
        top, left = (torch.from_numpy(rng.integers(0, half + 1, count)).to(device) for _ in range(2))
        y = top[:, None] + torch.arange(half, device=device)
        x = left[:, None] + torch.arange(half, device=device)
        tokens = tokens[rows[:, None, None], y[:, :, None], x[:, None, :]]
        fine = torch.arange(SIZE // 2, device=device)
        y, x = top[:, None] * PATCH + fine, left[:, None] * PATCH + fine
        images = images.permute(0, 2, 3, 1)[rows[:, None, None], y[:, :, None], x[:, None, :]].permute(
            0, 3, 1, 2
        )
    return (images * 2 - 1).contiguous(memory_format=torch.channels_last), tokens


@torch.no_grad()
def reconstruction(vq: nn.Module, codes: PatchCodes, lines: list[Metadata], device: str) -> dict[str, float]:
    """Scores by the Scenes detector of renders of `lines` and of what the decoder makes of their tokens."""
    images = render(sample_scenes(lines, np.random.default_rng(7)).to(device), SIZE)
    tokens = codes.tokens(images)
    output = (vq.decode(tokens) / 2 + 0.5).clamp(0, 1)
    shares = [
        np.mean([score(objects, line).correct for objects, line in zip(detect(x.cpu()), lines, strict=True)])
        for x in (images, output)
    ]
    encoded = vq.encode(images * 2 - 1).image_tokens.view_as(tokens)
    return {
        "renders": float(shares[0]),
        "reconstructions": float(shares[1]),
        "psnr": -10 * (output - images).square().mean().log10().item(),
        "encoder_agrees": (encoded == tokens).float().mean().item(),
    }


def train_vq(folder: Path, codes: PatchCodes, device: str, seed: int, samples: int, batch: int = 16) -> None:
    """Trains and saves `folder/vq`; resumes from `folder/vq.pt`. `samples` are 64 px crops for the first 80 %
    of the work and a quarter as many whole images after that."""
    torch.manual_seed(seed)
    codes = codes.to(device)
    vq = build_vq().to(device, memory_format=torch.channels_last).train()
    vq.quantize.embedding.weight.requires_grad_(False).copy_(codes.codes_KD)
    kernels = [p for p in vq.parameters() if p.requires_grad and p.ndim > 1]
    rest = [p for p in vq.parameters() if p.requires_grad and p.ndim == 1]
    rate = 2e-3
    optimizers = [BatchedMuon(kernels, rate), torch.optim.AdamW(rest, rate, (0.9, 0.97), fused=True)]
    state = {"seen": 0, "step": 0, "seconds": 0.0}
    checkpoint = folder / "vq.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=device)
        vq.load_state_dict(saved["model"])
        for optimizer, part in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(part)
        state = saved["state"]
        print(f"vq resumed at {state['seen']} crops", flush=True)
    rng = np.random.default_rng([seed, 1, state["step"]])
    compiled = torch.compile(objective, dynamic=False)
    last = saved_at = time.time()

    def save() -> None:
        parts = [optimizer.state_dict() for optimizer in optimizers]
        save_atomically({"model": vq.state_dict(), "optimizers": parts, "state": state}, checkpoint)

    while state["seen"] < samples:
        progress = state["seen"] / samples
        scale = min(1, (state["step"] + 1) / 30) * min(1, 2 * (1 - progress) + 0.01)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
        crops = progress < 0.8
        images, tokens = draw_crops(rng, codes, batch if crops else batch // 4, crops, device)
        loss, square, vectors = compiled(vq, images, codes.codes_KD[tokens].permute(0, 3, 1, 2))
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        state["seen"] += batch
        state["step"] += 1
        if state["step"] % 20 == 0:
            now = time.time()
            state["seconds"] += now - last
            speed, last = 20 * batch / (now - last), now
            agree = (vectors.permute(0, 2, 3, 1) @ codes.codes_KD.T).argmax(-1) == tokens
            print(
                f"vq {state['seen']}/{samples} loss {loss.item():.4f} psnr "
                f"{-10 * (square / 4).log10().item():.2f} named {agree.float().mean().item():.3f} {speed:.1f}/s",
                flush=True,
            )
            if now - saved_at > 100:
                saved_at = now
                save()
    save()
    vq = vq.to(memory_format=torch.contiguous_format).float().eval()
    vq.save_pretrained(folder / "vq")


def vq_facts(vq: nn.Module, codes: PatchCodes, device: str) -> dict[str, float]:
    """What the model card says of the trained tokenizer: on 192 training captions."""
    return reconstruction(vq, codes.to(device), prompts("train", per_task=32, seed=7), device)
