"""Train the built-in diffusion model: Scenes in, a `FluxPipeline` folder out.

    python examples/train_scenes_diffusion.py --out runs/scenes-flux            # everything, resumable
    python examples/train_scenes_diffusion.py --out runs/scenes-flux --plan 64:2000000,128:400000,256:100000

Three stages, each skipped when its file is there and resumed when it is half done:

1. `text`: the tokenizers, and small T5 and CLIP encoders that learn to parse captions (which noun has which
   colour, number and relation). Minutes; afterwards they stay frozen.
2. `vae`: an `AutoencoderKL`, 4x4 pixels to 4 channels.
3. `flow`: a `FluxTransformer2DModel` by flow matching (rectified flow, logit-normal times as in Esser et al.
   2024, 2403.03206), resolution growing from 64 to 256 px. Image positions are given on the 256 px grid at
   every size, so what is learned about places carries over. A training-only linear head on a middle block
   predicts which shape and colour each token belongs to (after REPA, Yu et al. 2024, 2410.06940, with the
   renderer's own labels in place of a pretrained encoder).

Images are rendered on the fly. Runs on CPU (bf16, compiled) or one GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from batched_muon import BatchedMuon
from diffusers import AutoencoderKL, FluxPipeline
from safetensors.torch import load_file, save_file
from scenes_data import captions, token_labels
from scenes_text import Text, train_text
from torch import nn

from accel.evaluation.scenes import COLOR_NAMES, SHAPES, render, sample_scenes
from accel.pipelines.builtin.architecture import (
    GRID,
    TEXT_TOKENS,
    assemble,
    build_transformer,
    build_vae,
    shift_for,
)

# ----------------------------------------------------------------------------------------------- vae


def train_vae(folder: Path, device: str, seed: int, samples: int, batch: int = 32) -> float:
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    vae = build_vae().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-4)

    def loss_fn(images):
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            sample = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
            output = vae.decode(sample).sample.float()
        error = output - images
        # Edges are few pixels and all of the shape: the error of differences weighs them up.
        edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (
            error[..., 1:, :] - error[..., :-1, :]
        ).abs().mean()
        return error.abs().mean() + error.square().mean() + edges + 1e-4 * posterior.kl().mean() / images[
            0, 0
        ].numel(), error

    compiled = torch.compile(loss_fn, dynamic=False)
    started, seen, step, total = time.time(), 0, 0, samples
    while seen < total:
        size, count = (64, batch) if step % 8 else (128, batch // 4)
        images = render(sample_scenes(captions(rng, count), rng), size).to(device) * 2 - 1
        progress = seen / total
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * min(1, 2 * (1 - progress) + 0.01)
        loss, error = compiled(images.to(memory_format=torch.channels_last))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        seen, step = seen + count * (size // 64) ** 2, step + 1
        if step % 50 == 0:
            psnr = -10 * math.log10(error.detach().square().mean().item() / 4)
            print(
                f"vae {seen}/{total} loss {loss.item():.4f} psnr {psnr:.1f} {time.time() - started:.0f}s",
                flush=True,
            )
    with torch.no_grad():
        vae.float()
        images = render(sample_scenes(captions(rng, 32), rng), 256).to(device) * 2 - 1
        latents = vae.encode(images).latent_dist.mean
        psnr = -10 * math.log10((vae.decode(latents).sample.clamp(-1, 1) - images).square().mean().item() / 4)
        shift, scale = latents.mean().item(), 1 / latents.std().item()
    vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    print(f"vae done: psnr at 256 px {psnr:.2f} dB, scale {scale:.3f}, shift {shift:.3f}", flush=True)
    vae.to(memory_format=torch.contiguous_format).save_pretrained(folder / "vae")
    return psnr


def write(pipe: FluxPipeline, folder: Path) -> None:
    """Save with the names of the text encoder's weights that every transformers from 5.0 on finds; 5.24 writes others,
    which 5.0 takes for missing and draws at random."""
    pipe.save_pretrained(folder)
    file = folder / "text_encoder" / "model.safetensors"
    weights = {
        f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(file).items()
    }
    save_file(weights, file, {"format": "pt"})


# ---------------------------------------------------------------------------------------------- flow


def image_ids(grid: int, device: str) -> torch.Tensor:
    """(grid², 3) rotary positions, spread over the 32 x 32 grid of the full size at every size."""
    at = (torch.arange(grid, device=device) + 0.5) * (GRID / grid) - 0.5
    ids = torch.zeros(grid, grid, 3, device=device)
    ids[..., 1], ids[..., 2] = at[:, None], at[None, :]
    return ids.flatten(0, 1)


fused_attention = F.scaled_dot_product_attention


def plain_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **rest):
    """Attention as two matmuls: on CPU its backward is several times faster than the fused one's in bf16."""
    if attn_mask is not None or is_causal or not torch.is_grad_enabled():
        return fused_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **rest)
    weights = (query @ key.transpose(-1, -2)) * (scale or query.shape[-1] ** -0.5)
    return weights.softmax(-1).to(value.dtype) @ value


exact_gelu = F.gelu


def sigmoid_gelu(x, approximate="none"):
    """The tanh form of GELU written with a sigmoid, the same function: tanh takes 1.6 times as long on CPU."""
    if approximate != "tanh":
        return exact_gelu(x, approximate=approximate)
    wide = x.float()
    return (wide * torch.sigmoid(1.5957691216057308 * (wide + 0.044715 * wide**3))).to(x.dtype)


class Trainee(nn.Module):
    """The transformer with its training-only label head on the hidden states after block `tap`."""

    def __init__(self, tap: int = 2):
        super().__init__()
        self.transformer = build_transformer()
        self.head = nn.Linear(256, len(SHAPES) + 1 + len(COLOR_NAMES) + 1)
        self.tapped: torch.Tensor | None = None
        self.transformer.single_transformer_blocks[tap].register_forward_hook(self._keep)

    def _keep(self, module, args, output):
        self.tapped = output[1]

    def forward(self, noisy, tokens, pooled, time, ids, text_ids, target, shapes, colors):
        velocity = self.transformer(
            hidden_states=noisy,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            timestep=time,
            img_ids=ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0]
        flow = (velocity.float() - target).square().mean()
        logits = self.head(self.tapped).float()
        s, c = logits.split([len(SHAPES) + 1, len(COLOR_NAMES) + 1], -1)
        labels = F.cross_entropy(s.flatten(0, 1), shapes.flatten()) + F.cross_entropy(
            c.flatten(0, 1), colors.flatten()
        )
        return flow, labels


class Pool:
    """Encoded samples, rendered in bulk and used `reuse` times each with fresh noise, so that rendering and
    encoding stay a small share of the step."""

    def __init__(self, text: Text, vae: AutoencoderKL, rng: np.random.Generator, device: str, reuse: int = 3):
        self.text, self.vae, self.rng, self.device, self.reuse = text, vae, rng, device, reuse

    @torch.no_grad()
    def _fill(self, size: int, count: int):
        parts = []
        for start in range(0, count, 64):
            lines = captions(self.rng, min(64, count - start))
            scenes = sample_scenes(lines, self.rng).to(self.device)
            with torch.autocast(torch.device(self.device).type, torch.bfloat16):
                images = (render(scenes, size) * 2 - 1).contiguous(memory_format=torch.channels_last)
                latents = self.vae.encode(images).latent_dist.mean.float()
            latents = (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor
            side = latents.shape[-1]
            packed = FluxPipeline._pack_latents(latents, len(lines), latents.shape[1], side, side)
            drop = self.rng.random(len(lines)) < 0.1  # 10 % captions empty, for guidance
            texts = ["" if d else line.prompt for d, line in zip(drop, lines, strict=True)]
            parts.append((packed, *self.text(texts), *token_labels(scenes, side // 2)))
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    def batches(self, size: int, batch: int):
        count = max(batch, 4096 * 64 * 64 // (size * size) // batch * batch)
        while True:
            columns = self._fill(size, count)
            for _ in range(self.reuse):
                order = torch.from_numpy(self.rng.permutation(count)).to(self.device)
                for start in range(0, count, batch):
                    index = order[start : start + batch]
                    yield [column[index] for column in columns]


def optimizers(model: Trainee, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inner = "transformer_blocks" in name and parameter.ndim == 2 and ".norm" not in name
        (matrices if inner else rest).append(parameter)
    return [BatchedMuon(matrices, lr), torch.optim.AdamW(rest, lr, (0.9, 0.97), weight_decay=0.0, fused=True)]


BATCH = {64: 128, 128: 48, 256: 16}


def train_flow(
    folder: Path, device: str, seed: int, plan: list[tuple[int, int]], lr: float, decay: float
) -> None:
    torch.manual_seed(seed)
    cpu = device == "cpu"
    if cpu:
        F.scaled_dot_product_attention, F.gelu = plain_attention, sigmoid_gelu
    text = Text(folder, device)
    vae = AutoencoderKL.from_pretrained(folder / "vae").to(device, memory_format=torch.channels_last)
    model = Trainee().to(device)
    ema = {k: v.clone() for k, v in model.transformer.state_dict().items()}
    opts = optimizers(model, lr)
    print(
        f"flow: {sum(p.numel() for p in model.transformer.parameters()) / 1e6:.1f} M parameters", flush=True
    )

    state = {"stage": 0, "seen": 0, "step": 0, "seconds": 0.0, "curve": []}
    checkpoint = folder / "flow.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(saved["model"])
        ema = saved["ema"]
        for opt, opt_state in zip(opts, saved["opts"], strict=True):
            opt.load_state_dict(opt_state)
        state = saved["state"]
        print(f"resumed at stage {state['stage']}, {state['seen']} samples", flush=True)

    def save():
        part = checkpoint.with_suffix(".part")
        torch.save(
            {"model": model.state_dict(), "ema": ema, "opts": [o.state_dict() for o in opts], "state": state},
            part,
        )
        part.rename(checkpoint)

    # Cost in units of 64 px samples decides how far the whole run is, for the decay at its end.
    cost = {64: 1.0, 128: 4.2, 256: 21.0}
    total = sum(samples * cost[size] for size, samples in plan)
    text_ids = torch.zeros(TEXT_TOKENS, 3, device=device)
    compiled = torch.compile(model, dynamic=False)
    saved_at = time.time()  # by the clock: a step at 256 px takes twenty times as long as one at 64 px
    while state["stage"] < len(plan):
        size, samples = plan[state["stage"]]
        batch = BATCH[size] * (1 if cpu else 4)
        pool = Pool(text, vae, np.random.default_rng([seed, 2, state["step"]]), device)
        ids = image_ids(size // 8, device)
        last = time.time()
        for latents, tokens, pooled, shapes, colors in pool.batches(size, batch):
            if state["seen"] >= samples:
                break
            done = sum(n * cost[s] for s, n in plan[: state["stage"]]) + state["seen"] * cost[size]
            scale = min(1, (state["step"] + 1) / 100) * min(1, (1 - done / total) / decay + 0.01)
            for opt in opts:
                for group in opt.param_groups:
                    group["lr"] = lr * scale
            times = torch.sigmoid(torch.randn(len(latents), device=device) + shift_for(size))
            noise = torch.randn_like(latents)
            noisy = latents + times[:, None, None] * (noise - latents)
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                flow, labels = compiled(
                    noisy, tokens, pooled, times, ids, text_ids, noise - latents, shapes, colors
                )
            for opt in opts:
                opt.zero_grad(set_to_none=True)
            (flow + 0.2 * labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            for opt in opts:
                opt.step()
            state["seen"] += len(latents)
            state["step"] += 1
            # The average starts afresh with every size: what was right for another one blurs it.
            stage_step = state["seen"] // batch
            keep = min(0.995, stage_step / (10 + stage_step))
            with torch.no_grad():
                torch._foreach_lerp_(
                    list(ema.values()), list(model.transformer.state_dict().values()), 1 - keep
                )
            if state["step"] % 50 == 0:
                now = time.time()
                state["seconds"] += now - last
                rate = 50 * batch / (now - last)
                last = now
                row = [
                    size,
                    state["seen"],
                    round(flow.item(), 4),
                    round(labels.item(), 4),
                    round(state["seconds"]),
                ]
                state["curve"].append(row)
                print("flow", *row, f"lr {lr * scale:.2e} {rate:.0f}/s done {done / total:.3f}", flush=True)
            if time.time() - saved_at > 300:
                save()
                write(assemble(folder, ema), folder / "pipeline")
                saved_at = time.time()
        state["stage"] += 1
        state["seen"] = 0
        save()
    write(assemble(folder, ema), folder / "pipeline")
    recipe = {
        "seed": seed,
        "device": device,
        "lr": lr,
        "decay": decay,
        "plan": plan,
        "batches": [BATCH[size] * (1 if cpu else 4) for size, _ in plan],
        **json.loads((folder / "parts.json").read_text()),
        "parameters": sum(value.numel() for value in ema.values()),
        "seconds": state["seconds"],
        "curve": state["curve"],
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the pipeline")
    parser.add_argument(
        "--plan", default="64:1000000,128:150000,256:40000", help="size:samples,... of the flow stage"
    )
    parser.add_argument("--text-steps", type=int, default=2000, help="batches of captions the text side sees")
    parser.add_argument("--vae-samples", type=int, default=40000, help="64 px images the autoencoder sees")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument(
        "--decay", type=float, default=0.5, help="share of the run over which the rate falls to zero"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    plan = [tuple(int(n) for n in part.split(":")) for part in args.plan.split(",")]
    if not (args.out / "text_encoder_2").exists():
        train_text(args.out, args.device, args.seed, args.text_steps)
    if not (args.out / "vae").exists():
        psnr = train_vae(args.out, args.device, args.seed, args.vae_samples)
        parts = {"text_steps": args.text_steps, "vae_samples": args.vae_samples, "vae_psnr": psnr}
        (args.out / "parts.json").write_text(json.dumps(parts))
    train_flow(args.out, args.device, args.seed, plan, args.lr, args.decay)


if __name__ == "__main__":
    main()
