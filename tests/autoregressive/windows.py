"""Windows against one token at a time, for any family: ragged rows, wrong drafts, rollbacks, over the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from accel.pipelines.autoregressive import AutoregressivePipeline
from accel.pipelines.autoregressive.model import PromptedModel


def prompted(
    pipe: AutoregressivePipeline,
    prompts: Sequence[Any],
    guidance: float,
    height: int | None = None,
    width: int | None = None,
) -> PromptedModel:
    return PromptedModel(pipe.adapter, pipe.adapter.layout(height, width), prompts, guidance)


@torch.no_grad()
def worst_difference(
    pipe: AutoregressivePipeline, prompts: Sequence[Any], guidance: float, **size: int
) -> float:
    """The largest difference of logits, relative to their spread.

    Each round feeds a window whose tokens are right up to a random length of each row's own and wrong after it,
    compares what was predicted after the right ones, and goes back to the first wrong one.
    """
    model = prompted(pipe, prompts, guidance, **size)
    slots, images, vocabulary = len(model.forced_N), model.images, model.vocabulary
    generator = torch.Generator().manual_seed(0)
    sampled_BN = torch.randint(vocabulary, (images, slots), generator=generator)
    token_BN = torch.where(model.forced_N >= 0, model.forced_N, sampled_BN)
    at_B = torch.zeros(images, dtype=torch.int64)
    single = [model.forward(token_BN[:, slot : slot + 1], at_B + slot)[:, 0] for slot in range(slots)]
    expected_BNV = torch.stack(single, 1)

    model, width, worst = prompted(pipe, prompts, guidance, **size), 5, 0.0
    padded = torch.cat([token_BN, token_BN.new_zeros(images, width)], 1)
    while (at_B < slots).any():
        index_BW = at_B[:, None] + torch.arange(width)
        right_B = torch.randint(1, width + 1, (images,), generator=generator)
        wrong = torch.arange(width) >= right_B[:, None]
        true_BW = padded.gather(1, index_BW)
        token_BW = torch.where(wrong, (true_BW + 1) % vocabulary, true_BW)
        logits_BWV = model.forward(token_BW, at_B)
        for b in range(images):
            start = int(at_B[b])
            if count := min(int(right_B[b]), slots - start):
                difference = logits_BWV[b, :count] - expected_BNV[b, start : start + count]
                worst = max(worst, float(difference.abs().max()))
        at_B = (at_B + right_B).clamp(max=slots)
    return worst / float(expected_BNV.std())
