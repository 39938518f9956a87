"""A bias of log(slot size) on image keys, so that a slot weighs in attention as much as the tokens it stands for.

It goes where the attention takes a mask; where there is a mask already, it goes into it.
Shapes: P plan rows, B batch, K slots, N image tokens, S all keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from accel.core.plan import TokenPlan
from accel.core.site import Get, Side, rows
from accel.core.weighted_attention import SizedMask


def key_bias(
    name: str,
    *,
    table: str,
    image: Literal["first", "last"],
    key: str | None = None,
    dim: int = 0,
    flat: bool = False,
    tokens: str = "hidden_states",
) -> Side:
    """An additive mask in the argument `name`: (P or B, 1, 1, S), or (P or B, S) if `flat`.

    Args:
        table: an argument with a row for every key, or a tuple of such: tells how many keys are no image tokens.
        dim: the dimension of its rows.
        image: where the image's keys are.
        key: of the mask in `name`, if that is a dict.
        tokens: the argument that holds the tokens, in whose type attention wants its mask.
    """
    return Side(name, _KeyBias(name, table, image, key, dim, flat, tokens))


@dataclass(frozen=True)
class _KeyBias:
    name: str
    table: str
    image: Literal["first", "last"]
    key: str | None
    dim: int
    flat: bool
    tokens: str

    def __call__(self, get: Get, plan: TokenPlan) -> Any:
        table = get(self.table)
        table = table[0] if isinstance(table, (tuple, list)) else table
        log_PK = plan.size.log()
        rest = log_PK.new_zeros(log_PK.shape[0], table.shape[self.dim] - plan.tokens)
        bias = torch.cat([log_PK, rest] if self.image == "first" else [rest, log_PK], 1)
        bias = bias if self.flat else bias[:, None, None]
        # Square masks have rows of queries, too.
        dims = (-1,) if self.flat else (-2, -1)
        value = rows(self.name, image=self.image, dims=dims, item=self.key).follow(get, plan)
        mask = value if self.key is None else (value or {}).get(self.key)
        if mask is not None:
            bias = bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
        bias = bias.to(get(self.tokens).dtype)
        if mask is None and plan.classes:
            others = (1, rest.shape[1])
            bias = SizedMask.of(
                bias, (*plan.classes, others) if self.image == "first" else (others, *plan.classes)
            )
        return bias if self.key is None else {**(value or {}), self.key: bias}
