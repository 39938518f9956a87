"""Tokens of reference images, which editing models append to those of the image and whose predictions nobody reads.

Keys and values of what does not change from step to step need not be computed at each (as KleinKV, a model of its own,
is trained for; here they are a step's, of a model that is not).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from accel.core.plan import TokenPlan
from accel.core.schedule import Phase


def refreshes(phases: Sequence[Phase], every: int) -> frozenset[int]:
    """The steps at which reference tokens are computed: of those that compute anything every n-th, 0: the first."""
    computing = [step for step, phase in enumerate(phases) if phase.budget > 0]
    return frozenset(computing[::every] if every else computing[:1])


def sent(
    plan: TokenPlan | None, tokens: int, references: int, *, computed: bool, device: torch.device
) -> TokenPlan | None:
    """What goes through the blocks of the image's tokens and those behind it; None: all of them.

    Args:
        plan: of the image's N tokens; None: all are computed.
        computed: whether the references are.
    """
    if plan is None:
        if computed or not references:
            return None
        plan = TokenPlan.permutation(torch.arange(tokens, device=device))
    return plan.before(references, computed=computed)
