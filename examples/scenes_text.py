"""The text side of the built-in diffusion model: small T5 and CLIP encoders that learn to parse Scenes' captions."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scenes_data import captions
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from accel.evaluation.geneval.metadata import TASKS
from accel.evaluation.scenes import COLOR_NAMES, SHAPES
from accel.evaluation.scenes.prompts import draw
from accel.evaluation.scenes.world import PLURALS, RELATIONS, words
from accel.pipelines.builtin.architecture import TEXT_TOKENS, build_text_encoders, build_tokenizers


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


class Meanings:
    """What the text side learns to say: sums of fixed orthonormal vectors, one for every shape, colour, role, number.

    A noun's feature is the sum over what the caption says of it, all other tokens share one vector, and the pooled
    feature is the normalised sum over the caption. So a combination that was never drawn lies where its parts say,
    and not, as features of a parser that was free to choose them did, anywhere: those made purple crosses blue.
    """

    def __init__(self, seed: int, width: int = 128):
        basis = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)))[0]
        *self.tables, (self.other,), self.bag = basis[: sum(self.sizes)].split(self.sizes)

    sizes = (len(SHAPES), len(COLOR_NAMES) + 1, 9, 6, 1, 32)

    def __call__(self, lines: list) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, TEXT_TOKENS, 128) and (B, 128), of about unit variance."""
        rows, at, targets, bags = parse_targets(lines)
        tokens = (2 * self.other).expand(len(lines), TEXT_TOKENS, -1).clone()
        tokens[rows, at] = sum(table[targets[:, k]] for k, table in enumerate(self.tables))
        scale = self.other.numel() ** 0.5
        return tokens * scale / 2, F.normalize(bags @ self.bag, dim=-1) * scale


def read_captions(rng: np.random.Generator, count: int) -> list:
    """Captions of all combinations, half of them of relations, which are the hard part. Nothing is drawn here:
    held-out combinations are held out of the images, as a text encoder from elsewhere knows them, too."""
    tasks = ["position"] * (count // 2) + [str(task) for task in rng.choice(TASKS, count // 4)]
    return [draw(task, rng, str(rng.choice(["train", "test"]))) for task in tasks] + captions(
        rng, count - len(tasks)
    )


def train_text(folder: Path, device: str, seed: int, steps: int, batch: int = 192) -> None:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer, tokenizer_2 = build_tokenizers(words())
    clip, t5 = build_text_encoders(tokenizer, tokenizer_2)
    clip.to(device).train(), t5.to(device).train()
    params = [*clip.parameters(), *t5.parameters()]
    optimizer = torch.optim.AdamW(params, lr=2e-3, weight_decay=0.0)
    meanings = Meanings(seed)
    started = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
        lines = read_captions(rng, batch)
        wanted = [target.to(device) for target in meanings(lines)]
        said = encode(clip, t5, tokenizer, tokenizer_2, [line.prompt for line in lines], device)
        loss = sum(F.mse_loss(a, b) for a, b in zip(said, wanted, strict=True))
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
