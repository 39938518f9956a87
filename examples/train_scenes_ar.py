"""Train the built-in autoregressive model: Scenes in, a `JanusForConditionalGeneration` folder out.

    python examples/train_scenes_ar.py --out runs/scenes-janus            # everything, resumable

First the codes, a minute of k-means (scenes_vq.py); then two stages that do not need each other, so they can run
at the same time (`--stage`); each resumes where it was stopped, and goes on if asked for more samples:

- `pixels`: encoder and decoder of the VQ model, 128 px to 16 x 16 tokens and back.
- `tokens`: the Llama reads `<s> caption <begin_of_image>` and learns to continue with the image's 256 tokens.
  A tenth of the captions are padding, as transformers' `generate` builds the unguided half; a share of the
  image tokens that it reads are wrong, so that one bad draw does not spoil the rest. Training-only linear
  heads say what the caption asks for (at its end) and which shape and colour the next token and the one a row
  further belong to.
- `export`: both as a folder for `from_pretrained`.

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
from scenes_data import captions, token_labels
from scenes_vq import PatchCodes, load_codes, save_atomically, train_vq, vq_facts
from torch import nn
from transformers import JanusForConditionalGeneration, JanusProcessor, JanusVQVAE

from accel.evaluation.geneval.metadata import Metadata
from accel.evaluation.scenes import COLOR_NAMES, SHAPES, render, sample_scenes
from accel.evaluation.scenes.world import RELATIONS, words
from accel.pipelines.builtin.janus_architecture import (
    CODE_DIM,
    CODES,
    GRID,
    LAYERS,
    SIZE,
    SPECIAL,
    WIDTH,
    build_model,
    build_processor,
)

# Tokens of the longest caption with <s> and <begin_of_image>; shorter ones are padded on the left.
PROMPT = 13
SLOTS = GRID**2
KINDS = (len(SHAPES) + 1, len(COLOR_NAMES) + 1)  # what a token can belong to; 0 is ground
NOUN = (len(SHAPES) + 1, len(COLOR_NAMES) + 1)  # 0: no noun, no colour word
SAMPLING = ("guidance_scale", "temperature", "top_k")
ASKED = (*NOUN, *NOUN, len(RELATIONS) + 1, 5)  # first noun, second noun, relation, count of the first


def asked_for(lines: list[Metadata]) -> torch.Tensor:
    """(B, 6): what captions say, in the order of `ASKED`."""
    rows = []
    for line in lines:
        items = list(line.include)
        relation = next((RELATIONS.index(i.position[0]) + 1 for i in items if i.position), 0)
        if relation:  # GenEval lists the reference first; the caption names it last
            items.reverse()
        nouns = []
        for item in (*items, None)[:2]:
            nouns += [SHAPES.index(item.label) + 1, 0] if item else [0, 0]
            if item and item.color:
                nouns[-1] = COLOR_NAMES.index(item.color) + 1
        rows.append([*nouns, relation, items[0].count])
    return torch.tensor(rows)


class Trainee(nn.Module):
    """The generating half of the model, with its training-only heads.

    The layers are walked here and not by `LlamaModel`, for the hidden states in between.
    """

    def __init__(
        self, model: JanusForConditionalGeneration, read_at: int = LAYERS // 2 - 1, plan_at: int = LAYERS - 2
    ):
        super().__init__()
        self.llama = model.model.language_model
        self.embeddings = model.model.generation_embeddings
        self.aligner = model.model.generation_aligner
        self.head = model.model.generation_head
        self.read, self.plan = nn.Linear(WIDTH, sum(ASKED)), nn.Linear(WIDTH, 2 * sum(KINDS))
        self.read_at, self.plan_at = read_at, plan_at

    def forward(self, prompt, mask, seen, target, asked, shapes, colors):
        """Prompt ids (B, PROMPT) with `mask` 0 at padding; tokens as the model sees them and as they are, and
        per token its shape and colour, all (B, SLOTS). Returns (tokens' loss, heads' loss, share guessed)."""
        given = self.aligner(self.embeddings(seen[:, :-1]))
        hidden = torch.cat([self.llama.embed_tokens(prompt).to(given.dtype), given], 1)
        length = hidden.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
        allowed = causal & F.pad(mask.bool(), (0, SLOTS - 1), value=True)[:, None, None, :]
        # A padding row sees itself, or its softmax would have nothing to divide by.
        allowed = allowed | torch.eye(length, dtype=torch.bool, device=hidden.device)
        bias = torch.zeros_like(allowed, dtype=hidden.dtype).masked_fill_(~allowed, -30000.0)
        rotary = self.llama.rotary_emb(hidden, torch.arange(length, device=hidden.device)[None])
        kept = {}
        for index, layer in enumerate(self.llama.layers):
            hidden = layer(hidden, attention_mask=bias, position_embeddings=rotary)
            kept[index] = hidden
        logits = self.head(self.llama.norm(hidden[:, PROMPT - 1 :])).float()
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())

        read = self.read(kept[self.read_at][:, PROMPT - 1]).float().split(ASKED, -1)
        heads = sum(F.cross_entropy(part, asked[:, i]) for i, part in enumerate(read)) / len(ASKED)
        plan = self.plan(kept[self.plan_at][:, PROMPT - 1 :]).float().split((*KINDS, *KINDS), -1)
        for part, labels in zip(plan[:2], (shapes, colors), strict=True):
            heads = heads + F.cross_entropy(part.flatten(0, 1), labels.flatten())
        for part, labels in zip(plan[2:], (shapes, colors), strict=True):
            below = part[:, : SLOTS - GRID].flatten(0, 1), labels[:, GRID:].flatten()
            heads = heads + F.cross_entropy(*below)
        return loss, heads, (logits.detach().argmax(-1) == target).float().mean()


class Pool:
    """Tokenised samples, rendered in bulk and used `reuse` times each with fresh noise, so that rendering
    stays a small share of the step."""

    def __init__(self, processor: JanusProcessor, codes: PatchCodes, rng: np.random.Generator, device: str):
        self.processor, self.codes, self.rng, self.device = processor, codes.to(device), rng, device

    @torch.no_grad()
    def _fill(self, count: int) -> list[torch.Tensor]:
        parts = []
        for start in range(0, count, 32):
            lines = captions(self.rng, min(32, count - start))
            scenes = sample_scenes(lines, self.rng).to(self.device)
            tokens = self.codes.tokens(render(scenes, SIZE))
            read = self.processor(
                text=[line.prompt for line in lines],
                generation_mode="image",
                padding="max_length",
                max_length=PROMPT,
                return_tensors="pt",
            )
            prompt, mask = read.input_ids.to(self.device), read.attention_mask.to(self.device)
            parts.append(
                (prompt, mask, tokens, asked_for(lines).to(self.device), *token_labels(scenes, GRID))
            )
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    def batches(self, count: int, batch: int, reuse: int):
        while True:
            columns = self._fill(count)
            for _ in range(reuse):
                order = torch.from_numpy(self.rng.permutation(count)).to(self.device)
                for start in range(0, count, batch):
                    index = order[start : start + batch]
                    yield [column[index] for column in columns]


def optimizers(model: Trainee, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        (matrices if "llama.layers" in name and parameter.ndim == 2 else rest).append(parameter)
    return [BatchedMuon(matrices, lr), torch.optim.AdamW(rest, lr, (0.9, 0.97), weight_decay=0.0, fused=True)]


def start(model: JanusForConditionalGeneration, codes: PatchCodes) -> None:
    """Codes as the first embeddings, and every layer as the identity."""
    model.model.generation_embeddings.weight.data.copy_(codes.codes_KD * CODE_DIM**0.5)
    for layer in model.model.language_model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    nn.init.zeros_(model.model.generation_head.vision_head.weight)


def train_tokens(folder: Path, codes: PatchCodes, device: str, args: argparse.Namespace) -> None:
    """Trains the Llama; resumes from and ends in `folder/tokens.pt`."""
    torch.manual_seed(args.seed)
    processor = build_processor(words())
    boi = processor.tokenizer.convert_tokens_to_ids(SPECIAL["boi_token"])
    bos, pad = processor.tokenizer.bos_token_id, processor.tokenizer.pad_token_id
    model = build_model(processor.tokenizer)
    start(model, codes)
    # Attention as two matmuls: on CPU its backward is several times faster than the fused one's in bf16.
    model.set_attn_implementation("eager" if device == "cpu" else "sdpa")
    trainee = Trainee(model).to(device).train()
    opts = optimizers(trainee, args.lr)
    state = {"seen": 0, "step": 0, "seconds": 0.0, "curve": []}
    checkpoint = folder / "tokens.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=device)
        trainee.load_state_dict(saved["model"])
        for opt, opt_state in zip(opts, saved["opts"], strict=True):
            opt.load_state_dict(opt_state)
        state = saved["state"]
        print(f"resumed at {state['seen']} samples", flush=True)

    def save() -> None:
        parts = [opt.state_dict() for opt in opts]
        save_atomically({"model": trainee.state_dict(), "opts": parts, "state": state}, checkpoint)

    pool = Pool(processor, codes, np.random.default_rng([args.seed, 2, state["step"]]), device)
    batch = args.batch
    compiled = torch.compile(trainee, dynamic=False)
    last = saved_at = time.time()
    for prompt, mask, tokens, asked, shapes, colors in pool.batches(args.pool, batch, args.reuse):
        progress = max(state["seen"] / args.samples, state["seconds"] / (60 * args.minutes))
        if progress >= 1:
            break
        scale = min(1, (state["step"] + 1) / 100) * min(1, (1 - progress) / args.decay + 0.01)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = args.lr * scale
        # As `generate` does for the half without the caption: all but <s> and <begin_of_image> is padding.
        drop = torch.rand(batch, 1, device=device) < 0.1
        prompt = torch.where(drop & (prompt != bos) & (prompt != boi), pad, prompt)
        asked = torch.where(drop, 0, asked)
        wrong = torch.rand(tokens.shape, device=device) < args.wrong * torch.rand(batch, 1, device=device) * 2
        seen = torch.where(wrong, torch.randint_like(tokens, CODES), tokens)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss, heads, guessed = compiled(prompt, mask, seen, tokens, asked, shapes, colors)
        for opt in opts:
            opt.zero_grad(set_to_none=True)
        (loss + args.heads * heads).backward()
        nn.utils.clip_grad_norm_(trainee.parameters(), 1.0, foreach=True)
        for opt in opts:
            opt.step()
        state["seen"] += batch
        state["step"] += 1
        if state["step"] % 20 == 0:
            now = time.time()
            state["seconds"] += now - last
            rate, last = 20 * batch / (now - last), now
            numbers = [round(value.item(), 4) for value in (loss, heads, guessed)]
            state["curve"].append([state["seen"], *numbers, round(state["seconds"])])
            print("tokens", *state["curve"][-1], f"lr {args.lr * scale:.2e} {rate:.1f}/s", flush=True)
            if now - saved_at > 120:
                save()
                saved_at = time.time()
    save()


def export(folder: Path, codes: PatchCodes, args: argparse.Namespace) -> None:
    """`folder/model`, which `from_pretrained` reads, in bfloat16, and `folder/recipe.json`."""
    torch.manual_seed(args.seed)  # of the parts that stay untrained
    processor = build_processor(words())
    model = build_model(processor.tokenizer)
    vq = JanusVQVAE.from_pretrained(folder / "vq")
    saved = torch.load(folder / "tokens.pt", weights_only=True, map_location="cpu")
    Trainee(model).load_state_dict(saved["model"])
    model.model.vqmodel.load_state_dict(vq.state_dict())
    for name in SAMPLING:
        setattr(model.generation_config, name, getattr(args, name) or None)
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    names = (
        "lr",
        "decay",
        "batch",
        "pool",
        "reuse",
        "wrong",
        "heads",
        "seed",
        "device",
        "vq_samples",
        *SAMPLING,
    )
    recipe = {
        **{name: getattr(args, name) for name in names},
        "samples": saved["state"]["seen"],
        "seconds": saved["state"]["seconds"],
        "parameters": {name: count(part) for name, part in model.model.named_children()},
        "vq": vq_facts(vq.eval(), codes, "cpu"),
        "curve": saved["state"]["curve"],
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the model")
    parser.add_argument(
        "--vq-samples", type=int, default=64000, help="64 px crops that encoder and decoder see"
    )
    parser.add_argument("--samples", type=int, default=160000, help="images the token model sees")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="ends the token stage, decayed, at this time"
    )
    parser.add_argument("--stage", choices=["all", "pixels", "tokens", "export"], default="all")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pool", type=int, default=2048, help="images rendered at a time")
    parser.add_argument("--reuse", type=int, default=2, help="how often each is used")
    parser.add_argument("--wrong", type=float, default=0.06, help="share of wrong tokens the model reads")
    parser.add_argument("--heads", type=float, default=0.1, help="weight of the training-only heads")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument(
        "--decay", type=float, default=0.5, help="share of the run over which the rate falls to zero"
    )
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="default of the exported model")
    parser.add_argument("--temperature", type=float, default=1.0, help="the same")
    parser.add_argument("--top-k", type=int, default=0, help="the same; 0: all tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    codes = load_codes(args.out, args.seed)
    if args.stage in ("all", "pixels"):
        train_vq(args.out, codes, args.device, args.seed, args.vq_samples)
    if args.stage in ("all", "tokens"):
        train_tokens(args.out, codes, args.device, args)
    if args.stage in ("all", "export"):
        export(args.out, codes, args)


if __name__ == "__main__":
    main()
