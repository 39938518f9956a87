"""Train the built-in diffusion model: Scenes in, a `FluxPipeline` folder out.

    python examples/train_scenes_diffusion.py --out runs/scenes-flux            # everything, resumable
    python examples/train_scenes_diffusion.py --out runs/scenes-flux --plan 64:2000000,128:400000,256:100000

Three stages, each skipped when its file is there and resumed when it is half done:

1. `text`: the tokenizers, and small T5 and CLIP encoders that learn to parse captions (which noun has which
   colour, number and relation). A minute; afterwards they stay frozen.
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
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from accel.evaluation.scenes import COLOR_NAMES, SHAPES, Scenes, render, sample_scenes
from accel.evaluation.scenes.prompts import colored_position, draw
from accel.evaluation.scenes.render import object_coverage
from accel.evaluation.scenes.world import NUMBERS, PLURALS, RELATIONS

TEXT_TOKENS = 16  # the longest caption is 13 words and an end token
GRID = 32  # image tokens per side at 256 px
TASK_WEIGHTS = {
    "single_object": 1,
    "two_object": 2,
    "counting": 2,
    "colors": 1,
    "position": 2,
    "color_attr": 2,
}


# ---------------------------------------------------------------------------------------------- data


def captions(rng: np.random.Generator, count: int) -> list:
    """Metadata of `count` random training captions over all tasks."""
    tasks = [*TASK_WEIGHTS, "colored_position"]
    weights = np.array([*TASK_WEIGHTS.values(), 2], float)
    return [
        colored_position(rng) if task == "colored_position" else draw(task, rng, "train")
        for task in rng.choice(tasks, count, p=weights / weights.sum())
    ]


def token_labels(scenes: Scenes, grid: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Per image token, the shape and the colour that fill most of it; 0 is ground. Each (B, grid²)."""
    shape = torch.zeros(len(scenes), grid, grid, dtype=torch.long, device=scenes.shape_BM.device)
    color = shape.clone()
    image, slot, cover = object_coverage(scenes, grid)
    inside = cover > 0.5
    shape.index_add_(0, image, inside * (scenes.shape_BM[image, slot] + 1)[:, None, None])
    color.index_add_(0, image, inside * (scenes.color_BM[image, slot] + 1)[:, None, None])
    return shape.clamp_(max=len(SHAPES)).flatten(1), color.clamp_(max=len(COLOR_NAMES)).flatten(1)


# ---------------------------------------------------------------------------------------------- text


def words() -> list[str]:
    relation_words = [word for relation in RELATIONS for word in relation.split()]
    return sorted(
        {"a", "an", "photo", "of", "and", *relation_words, *COLOR_NAMES, *SHAPES, *PLURALS, *NUMBERS}
    )


def build_tokenizers() -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """Word-level vocabularies in the two real formats; letters are there as well, for unknown words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -100.0), ("▁", -20.0)]
    pieces += [(f"▁{word}", -1.0) for word in words()] + [(letter, -20.0) for letter in letters]
    t5 = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TEXT_TOKENS)

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        end_of_word_suffix="</w>",
        initial_alphabet=list(letters),
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(words())] * 2, trainer)
    state = json.loads(bpe.to_str())["model"]
    vocab = dict(state["vocab"])
    for letter in letters:  # a letter that ends a word is a token of its own in CLIP's format
        vocab.setdefault(f"{letter}</w>", len(vocab))
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]
    clip = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_TOKENS)
    return clip, t5


def build_text_encoders(clip: CLIPTokenizer, t5: T5TokenizerFast) -> tuple[CLIPTextModel, T5EncoderModel]:
    clip_model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip),
            hidden_size=128,
            intermediate_size=256,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TEXT_TOKENS,
            bos_token_id=clip.bos_token_id,
            eos_token_id=clip.eos_token_id,
            pad_token_id=clip.pad_token_id,
        )
    )
    t5_model = T5EncoderModel(
        T5Config(
            vocab_size=len(t5),
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=4,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=t5.pad_token_id,
            eos_token_id=t5.eos_token_id,
        )
    )
    return clip_model, t5_model


class Text:
    """The frozen (or training) text side, used exactly as `FluxPipeline` uses it: no attention masks."""

    def __init__(self, folder: Path, device: str):
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.tokenizer_2 = T5TokenizerFast.from_pretrained(folder / "tokenizer_2")
        self.clip = CLIPTextModel.from_pretrained(folder / "text_encoder").to(device)
        self.t5 = T5EncoderModel.from_pretrained(folder / "text_encoder_2").to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, TEXT_TOKENS, 128) from T5 and (B, 128) pooled from CLIP."""
        return encode(self.clip, self.t5, self.tokenizer, self.tokenizer_2, texts, self.device)


def encode(clip, t5, tokenizer, tokenizer_2, texts, device):
    options = {"padding": "max_length", "max_length": TEXT_TOKENS, "truncation": True, "return_tensors": "pt"}
    ids_2 = tokenizer_2(texts, **options).input_ids.to(device)
    ids = tokenizer(texts, **options).input_ids.to(device)
    return t5(ids_2).last_hidden_state, clip(ids).pooler_output


def parse_targets(lines: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the text side must know, per noun: (row, word, [shape, colour, role, count]); and per caption, (B, 32).

    Role: 0 none, 1-4 the subject of relation r, 5-8 its object.
    """
    rows, positions, targets = [], [], []
    bags = torch.zeros(len(lines), 32)
    for row, line in enumerate(lines):
        text = line.prompt.split(" ")
        position_of = {}
        for at, word in enumerate(text):
            name = word if word in SHAPES else SHAPES[PLURALS.index(word)] if word in PLURALS else None
            if name:
                position_of[name] = at
        relation = next((RELATIONS.index(i.position[0]) for i in line.include if i.position), None)
        if relation is not None:
            bags[row, 28 + relation] = 1
        for item in line.include:
            shape, color = SHAPES.index(item.label), (COLOR_NAMES.index(item.color) + 1 if item.color else 0)
            role = 0 if relation is None else 1 + relation + (0 if item.position else 4)
            rows.append(row)
            positions.append(position_of[item.label])
            targets.append([shape, color, role, item.count])
            bags[row, shape] = 1
            bags[row, 8 + color] = 1
            bags[row, 20 + item.count] = 1
    return torch.tensor(rows), torch.tensor(positions), torch.tensor(targets), bags


def train_text(folder: Path, device: str, seed: int, steps: int, batch: int = 192) -> None:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer, tokenizer_2 = build_tokenizers()
    clip, t5 = build_text_encoders(tokenizer, tokenizer_2)
    clip.to(device).train(), t5.to(device).train()
    sizes = (len(SHAPES), len(COLOR_NAMES) + 1, 9, 6)
    heads = nn.ModuleList([nn.Linear(128, s) for s in sizes] + [nn.Linear(128, 32)]).to(device)
    params = [*clip.parameters(), *t5.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(params, lr=2e-3, weight_decay=0.01)
    started = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
        lines = captions(rng, batch)
        rows, at, targets, bags = (t.to(device) for t in parse_targets(lines))
        tokens, pooled = encode(clip, t5, tokenizer, tokenizer_2, [line.prompt for line in lines], device)
        nouns = tokens[rows, at]
        losses = [F.cross_entropy(head(nouns), targets[:, k]) for k, head in enumerate(heads[:4])]
        loss = sum(losses) + 5 * F.binary_cross_entropy_with_logits(heads[4](pooled), bags)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        if step % 250 == 0 or step == steps - 1:
            print(f"text {step:5d}/{steps} loss {loss.item():.4f} {time.time() - started:.0f}s", flush=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    tokenizer_2.save_pretrained(folder / "tokenizer_2")
    clip.save_pretrained(folder / "text_encoder")
    t5.save_pretrained(folder / "text_encoder_2")


# ----------------------------------------------------------------------------------------------- vae


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=256,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def train_vae(folder: Path, device: str, seed: int, samples: int, batch: int = 32) -> None:
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


# ---------------------------------------------------------------------------------------------- flow


def build_transformer() -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        axes_dims_rope=(4, 30, 30),
    )
    # adaLN-zero (Peebles & Xie 2022): every block starts as the identity.
    for name, module in model.named_modules():
        if name.endswith((".norm.linear", ".norm1.linear", ".norm1_context.linear", "norm_out.linear")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(model.proj_out.weight)
    return model


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


class BatchedMuon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum, orthogonalised by five Newton-Schulz steps, scaled as in Liu et al.
    2025 (2502.16982). `torch.optim.Muon` goes matrix by matrix, which took 44 % of a step on two CPU cores;
    here equal shapes go through it as one batch.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, members in shapes.items():
                momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in members]
                grads = [p.grad for p in members]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, momenta, group["momentum"])
                update = orthogonalise(torch.stack(ahead).bfloat16()).float()
                torch._foreach_mul_(members, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(members, list(update), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonalise(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """(K, M, N) → the nearest semi-orthogonal matrices, roughly: a quintic that pushes singular values to 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[1] > x.shape[2]
    x = x.mT.contiguous() if tall else x
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).to(x.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def optimizers(model: Trainee, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inner = "transformer_blocks" in name and parameter.ndim == 2 and ".norm" not in name
        (matrices if inner else rest).append(parameter)
    return [BatchedMuon(matrices, lr), torch.optim.AdamW(rest, lr, (0.9, 0.97), weight_decay=0.0, fused=True)]


def shift_for(size: int) -> float:
    """Mean of the logit-normal times: more noise at larger sizes (the scheduler's own `mu` is linear in tokens)."""
    tokens = (size // 8) ** 2
    return 0.3 + (1.1 - 0.3) * (tokens - 64) / (1024 - 64)


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
            if state["step"] % 300 == 0:
                save()
                export(folder, ema)
        state["stage"] += 1
        state["seen"] = 0
        save()
    export(folder, ema)
    (folder / "curve.json").write_text(json.dumps(state["curve"]))


def export(folder: Path, ema: dict[str, torch.Tensor]) -> None:
    """Writes `pipeline/`, a complete `FluxPipeline` folder in bf16."""
    model = build_transformer()
    model.load_state_dict(ema)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=1.0,
            use_dynamic_shifting=True,
            base_image_seq_len=64,
            max_image_seq_len=1024,
            base_shift=0.3,
            max_shift=1.1,
        ),
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(folder / "text_encoder_2"),
        tokenizer_2=T5TokenizerFast.from_pretrained(folder / "tokenizer_2"),
        transformer=model,
    )
    pipe.to(dtype=torch.bfloat16)
    pipe.save_pretrained(folder / "pipeline")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the pipeline")
    parser.add_argument(
        "--plan", default="64:1000000,128:150000,256:40000", help="size:samples,... of the flow stage"
    )
    parser.add_argument("--text-steps", type=int, default=600, help="batches of captions the text side sees")
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
        train_vae(args.out, args.device, args.seed, args.vae_samples)
    train_flow(args.out, args.device, args.seed, plan, args.lr, args.decay)


if __name__ == "__main__":
    main()
