"""Teaches the frozen text encoders three more words, "small", "tiny" and "thin", through the letters they are spelt with.

The built-in model's vocabulary has single letters for words it does not know; nothing else uses them. Only their rows of
the two embedding tables are trained, so that every other caption's features stay the same to the last bit: the other
words' features are to be what they are without the new word, and its own letters' are to tell which word it is.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scenes_text import encode
from torch import Tensor, nn
from torch.func import functional_call

from accel.evaluation.scenes import SCALES
from accel.evaluation.scenes.prompts import DETAIL_TASKS, draw_detail

ENCODERS = ("text_encoder", "text_encoder_2")
AT = 4  # the new word is the fifth: "a photo of a tiny red star"


class Letters:
    """Which rows of an encoder's embedding table spell the new words, and what is added to them."""

    def __init__(self, encoder: nn.Module, tokenizer: Any):
        self.encoder = encoder
        pieces = sorted({piece for word in SCALES for piece in tokenizer.tokenize(word)})
        self.index = torch.tensor(tokenizer.convert_tokens_to_ids(pieces), device=encoder.device)
        table = encoder.get_input_embeddings().weight
        self.names = [name for name, p in encoder.named_parameters(remove_duplicate=False) if p is table]
        self.base = table.detach().float()
        self.added = torch.zeros(len(pieces), table.shape[1], device=encoder.device, requires_grad=True)

    def rows(self) -> Tensor:
        return self.base[self.index] + self.added

    def __call__(self, ids: Tensor) -> Any:
        table = self.base.index_add(0, self.index, self.added)
        return functional_call(self.encoder, dict.fromkeys(self.names, table), (ids.to(table.device),))


def train_letters(pipe: Any, seed: int, steps: int, batch: int = 64, rate: float = 3e-2) -> dict[str, Tensor]:
    """The new rows and their places, by the names they have in the side-car. The encoders are not changed."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 3])
    clip, t5 = pipe.text_encoder.float(), pipe.text_encoder_2.float()
    for p in (*clip.parameters(), *t5.parameters()):
        p.requires_grad_(False)
    letters = Letters(clip, pipe.tokenizer), Letters(t5, pipe.tokenizer_2)
    probe = torch.randn(len(SCALES), t5.config.d_model, device=t5.device, requires_grad=True)
    groups = [{"params": [x.added for x in letters], "lr": rate}, {"params": [probe], "lr": 1e-2}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    options = {"padding": "max_length", "max_length": 16, "truncation": True, "return_tensors": "pt"}
    pieces = [len(pipe.tokenizer_2.tokenize(word)) for word in SCALES]
    started = time.time()
    for step in range(steps):
        words = rng.integers(len(SCALES), size=batch)
        tasks = rng.choice(DETAIL_TASKS, batch)
        texts = [
            draw_detail(str(task), SCALES[word], rng, str(rng.choice(["train", "test"]))).prompt
            for task, word in zip(tasks, words, strict=True)
        ]
        plain = [" ".join(text.split(" ")[:AT] + text.split(" ")[AT + 1 :]) for text in texts]
        with torch.no_grad():
            wanted, wanted_pooled = encode(clip, t5, pipe.tokenizer, pipe.tokenizer_2, plain, t5.device)
        # Where each of the 16 tokens is without the new word's letters; -1 where a letter is.
        place = torch.tensor(
            [[*range(AT), *[-1] * pieces[w], *range(AT, 16 - pieces[w])] for w in words], device=t5.device
        )
        rest = (place >= 0)[..., None]
        target = wanted.gather(1, place.clamp(min=0)[..., None].expand_as(wanted))
        said = letters[1](pipe.tokenizer_2(texts, **options).input_ids).last_hidden_state
        pooled = letters[0](pipe.tokenizer(texts, **options).input_ids).pooler_output
        others = F.mse_loss(said * rest, target * rest) + F.mse_loss(pooled, wanted_pooled)
        # The first piece is the space, which all three share.
        own = said.masked_fill(rest | (place.roll(1, 1) >= 0)[..., None], 0).sum(1)
        guess = F.normalize(own, dim=-1) @ F.normalize(probe, dim=-1).T / 0.1
        told = F.cross_entropy(guess, torch.from_numpy(words).to(t5.device))
        optimizer.zero_grad(set_to_none=True)
        (others + 0.05 * told).backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            right = (guess.argmax(1).cpu().numpy() == words).mean()
            print(
                f"letters {step}/{steps} others {others.item():.4f} right {right:.2f} "
                f"{time.time() - started:.0f}s",
                flush=True,
            )
    return {
        f"{name}.{part}": value
        for name, x in zip(ENCODERS, letters, strict=True)
        for part, value in (("index", x.index), ("rows", x.rows().detach()))
    }
