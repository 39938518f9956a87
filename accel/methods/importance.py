"""Which tokens matter: they are protected from being merged.

Shapes: B batch, N tokens, C channels. Scores are (B, N), larger is more important.
"""

from __future__ import annotations

from torch import Tensor


def guidance_magnitude(outputs: tuple[Tensor, ...], samples: int) -> Tensor | None:
    """|v_cond - v_uncond| per token: Importance-based Token Merging (arXiv:2411.16720), section 4.

    Args:
        outputs: predictions (B, N, C) of one step: two calls, or one with both halves of guidance.
        samples: images per step.

    Returns:
        (samples, N), or None if the step had no guidance to compare.
    """
    if len(outputs) == 2 and outputs[0].shape == outputs[1].shape:
        a, b = outputs
    elif len(outputs) == 1 and outputs[0].shape[0] == 2 * samples:
        a, b = outputs[0].chunk(2)
    else:
        return None
    return (a - b).float().norm(dim=-1)
