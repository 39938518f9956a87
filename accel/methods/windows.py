"""Windows: square cells of the token grid that become one slot each where the picture is smooth.

Which they are is told by the picture that the last step predicted, in closed form: no matching, no hidden features. The
cells are fixed, so that equal grids and budgets have equal shapes, and every slot is the centre of its tokens.

Shapes: G plan rows, N = H*W tokens, K slots, C channels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accel.core.around import compiled
from accel.core.noise_levels import clean
from accel.core.plan import TokenPlan
from accel.core.run import Run
from accel.core.site import Site
from accel.core.target import Target
from accel.core.weighted_attention import chosen, weighed
from accel.errors import UnsupportedError

#: Measured on the built-in model, 4 steps, half of the tokens, 24 pictures: 35.5 dB with the bias, 26.6 without.
NO_BIAS = (
    "windows ran without a bias in attention, in which each then counts as one token: quality is much lower"
)

#: Where the model's attention goes another way than to the function at which keys are weighed.
NOT_WEIGHED = (
    "attention did not weigh what stands for several tokens: it does not go through torch's "
    "scaled_dot_product_attention (an attention processor or backend of another kind)"
)


def check_processors(target: Target, sites: Sequence[Site]) -> None:
    """At the first call of a run, before which pipelines set theirs.

    Raises:
        UnsupportedError: perturbed-attention guidance splits the batch, for the whole of which a mask has rows; or, in joint
            attention, lets image tokens attend to themselves, in one branch, which counts once whatever a slot stands for.
    """
    for site in sites:
        for path, module in _below(target, site):
            name = type(getattr(module, "processor", None)).__name__
            if "PAG" in name and (site.bias is not None or "Joint" in name):
                raise UnsupportedError(
                    f"{site.path}.{path} has a {name}: perturbed-attention guidance splits the batch inside of attention, "
                    "where slots cannot weigh as many tokens as they stand for. Use TokenMergingConfig(proportional=False), or "
                    "pag_scale=0."
                )


def _below(target: Target, site: Site) -> list[tuple[str, nn.Module]]:
    return [found for whole in target.modules for found in whole.get_submodule(site.path).named_modules()]


def tell_bias(run: Run, before: Counter[str], sites: Sequence[Site], windows: bool) -> None:
    """After a step of fewer tokens, whose keys were to be weighed: what the statistics say of it.

    Args:
        before: what `weighed` told before the step.
        sites: the modules that took part; masks reach any kind of attention, sized keys do not.
        windows: the tokens were put together in windows.
    """
    forms = weighed() - before
    if not forms and any(site.bias is not None for site in sites):
        forms = Counter(["mask"])
    elif not forms and (run.compilation is not None or _compiled(run)):  # not seen there
        forms = Counter(chosen().values()) or Counter(["mask"])
    run.stats.attention = ", ".join(sorted(forms)) or None
    if not forms:
        notes = [NO_BIAS, NOT_WEIGHED] if windows else [NOT_WEIGHED]
        run.stats.notes += [note for note in notes if note not in run.stats.notes]


def _compiled(run: Run) -> bool:
    return any(compiled(part) for outer in run.target.outers for part in outer.modules())


#: Tokens in a cell of either size.
SMALL, LARGE = 4, 16

#: Share of the tokens kept -> large windows per token: measured to be best at a half, a third and a quarter of 1024;
#: below, straight on to a sixteenth, where nothing else is left.
_LARGE_WINDOWS = ((1 / 16, 1 / 16), (1 / 4, 36 / 1024), (1 / 3, 1 / 32), (1 / 2, 0.0))


@dataclass(frozen=True)
class Counts:
    """How many windows of each size there are on a grid, the same in every image: shapes stay static."""

    tokens: int
    large: int
    small: int

    @property
    def singles(self) -> int:
        return self.tokens - LARGE * self.large - SMALL * self.small

    @property
    def slots(self) -> int:
        return self.singles + self.small + self.large


@lru_cache(maxsize=64)
def counts(grid: tuple[int, int], budget: float, multiple: int = 1) -> Counts:
    """The numbers of windows whose slots come nearest to `budget` x tokens, and are a multiple of `multiple`.

    Cells that the edge of the grid would cut stay single tokens.

    Raises:
        UnsupportedError: the budget is below what windows can do on this grid; says what they can.
    """
    height, width = grid
    N, large_cells, small_cells = height * width, (height // 4) * (width // 4), (height // 2) * (width // 2)
    least = N - 15 * large_cells - 3 * (small_cells - 4 * large_cells)
    wanted = budget * N
    if wanted < least - 0.5:
        raise UnsupportedError(
            f"windows of {height}x{width} = {N} tokens keep {least} of them at least, and {budget:.3g} is "
            f"{wanted:.0f}. Use a budget of {math.ceil(1000 * least / N) / 1000:.3g} or more."
        )
    aim = _interpolate(budget) * N
    best: tuple[float, float, Counts] | None = None
    for large in range(large_cells + 1):
        room = small_cells - 4 * large
        exact = (N - 15 * large - wanted) / 3
        # A multiple of 16 is at most 16 small windows away, in either direction.
        for small in range(max(0, math.floor(exact) - multiple), min(room, math.ceil(exact) + multiple) + 1):
            found = Counts(N, large, small)
            if found.slots % multiple:
                continue
            # Nearest to the budget first; among equals, nearest to the best share of large windows.
            rank = (abs(found.slots - wanted) + abs(large - aim) * _PER_WINDOW, abs(large - aim))
            if best is None or rank < best[:2]:
                best = (*rank, found)
    if best is None:  # no count is such a multiple
        return counts(grid, budget)
    return best[2]


#: Slots off the budget that one large window off its best number is worth: enough to keep that number where another
#: one would come a slot nearer.
_PER_WINDOW = 3.0


def _interpolate(budget: float) -> float:
    points = _LARGE_WINDOWS
    if budget >= points[-1][0]:
        return points[-1][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if budget <= x1:
            return y0 + (y1 - y0) * (max(budget, x0) - x0) / (x1 - x0)
    raise AssertionError(budget)


def picture(run: Run, step: int) -> Tensor:
    """The picture that the (guided) prediction of the last step to reach the scheduler shows, as the model's tokens:
    (B, N, c), float32.

    Args:
        step: which that is.

    Raises:
        UnsupportedError: it cannot be told from what the scheduler is given.
    """
    clock, adapter, scheduler = run.clock, run.target.adapter, run.target.scheduler
    output, sample = clock.model_output, clock.sample
    x0 = None
    if run.grid is not None and isinstance(output, Tensor) and isinstance(sample, Tensor):
        x0 = clean(scheduler, output.float(), sample.float(), clock.times[step])
    assert adapter.tokens is not None
    x0_BNc = None if x0 is None or run.grid is None else adapter.tokens.of(run.target.denoiser, x0, run.grid)
    if x0_BNc is None or run.grid is None or x0_BNc.shape[1] != run.grid[0] * run.grid[1]:
        raise UnsupportedError(
            "windows are chosen by the picture that a step predicts, and from what "
            f'{type(scheduler).__name__} is given it cannot be told. Use groups="matching" of TokenMergingConfig.'
        )
    return x0_BNc


def variance(x_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, N): variance of each token's 3x3 neighbourhood, E[x^2] - E[x]^2, summed over channels; at the edge over the
    neighbours there are."""
    map_BCHW = x_BNC.float().transpose(1, 2).unflatten(2, grid)
    map_BCHW = map_BCHW - map_BCHW.mean((2, 3), keepdim=True)  # squares of small numbers lose nothing
    mean, square = (
        F.avg_pool2d(m, 3, stride=1, padding=1, count_include_pad=False)
        for m in (map_BCHW, map_BCHW.square())
    )
    return (square - mean.square()).sum(1).flatten(1)


def coarser(score_GN: Tensor, grid: tuple[int, int], scale: int) -> Tensor:
    """The highest score in what is one token where the model works at 1 / `scale` of the grid (deeper in a U-Net, whose
    strides round up)."""
    if scale == 1:
        return score_GN
    return F.max_pool2d(score_GN.view(-1, 1, *grid), scale, ceil_mode=True).flatten(1)


def plan(score_GN: Tensor, grid: tuple[int, int], counts: Counts) -> TokenPlan:
    """One slot for each of the `counts.large` 4x4 cells whose highest score is lowest, then for each of the
    `counts.small` 2x2 cells among the rest; every other token is its own.

    Slots are in order of size, within a size in that of the grid: single tokens, small windows, large ones. Of equal
    scores the first cell wins.
    """
    G, (height, width) = score_GN.shape[0], grid
    N, n1, n4, n16 = counts.tokens, counts.singles, counts.small, counts.large
    map_G1HW = score_GN.float().view(G, 1, height, width)
    large_Ghw = _lowest(_cells(map_G1HW, 4), n16)
    small_Ghw = _cells(map_G1HW, 2)
    inside_Ghw = _spread(large_Ghw, 2, small_Ghw.shape[1:])
    small_Ghw = _lowest(small_Ghw.masked_fill(inside_Ghw, math.inf), n4)
    large_GN, small_GN = (_spread(m, s, grid).flatten(1) for m, s in ((large_Ghw, 4), (small_Ghw, 2)))

    slot1_GN = (~(large_GN | small_GN)).long().cumsum(1) - 1
    slot4_GN = _spread(_numbers(small_Ghw), 2, grid).flatten(1) + n1
    slot16_GN = _spread(_numbers(large_Ghw), 4, grid).flatten(1) + n1 + n4
    owner_GN = torch.where(large_GN, slot16_GN, torch.where(small_GN, slot4_GN, slot1_GN))

    # A window's own position, for what is not averaged, is its first token's. The others write past the end.
    row, column = (torch.arange(n, device=score_GN.device) for n in grid)
    first = {side: (row[:, None] % side + column % side == 0).flatten() for side in (2, 4)}
    leads_GN = torch.where(large_GN, first[4], torch.where(small_GN, first[2], True))
    position_GN = torch.arange(N, device=score_GN.device).expand(G, -1)
    dst_GK = owner_GN.new_zeros(G, counts.slots + 1)
    dst_GK = dst_GK.scatter(1, owner_GN.masked_fill(~leads_GN, counts.slots), position_GN)
    sizes = ((1, n1), (SMALL, n4), (LARGE, n16))
    size_K = torch.cat([torch.full((n,), float(s), device=score_GN.device) for s, n in sizes])
    dst_GK = dst_GK[:, : counts.slots].contiguous()
    return TokenPlan(dst_GK, owner_GN, size_K.expand(G, -1).contiguous(), centroid=True, classes=sizes)


def _cells(map_G1HW: Tensor, side: int) -> Tensor:
    """(G, H // side, W // side): the highest score of each whole cell."""
    return F.max_pool2d(map_G1HW, side)[:, 0] if min(map_G1HW.shape[2:]) >= side else map_G1HW[:, 0, :0, :0]


def _lowest(score_Ghw: Tensor, count: int) -> Tensor:
    """(G, h, w) bool: the `count` lowest of each row."""
    order_GM = score_Ghw.flatten(1).argsort(dim=1, stable=True)[:, :count]
    chosen_GM = torch.zeros_like(score_Ghw.flatten(1), dtype=torch.bool).scatter(1, order_GM, True)
    return chosen_GM.view_as(score_Ghw)


def _numbers(chosen_Ghw: Tensor) -> Tensor:
    return (chosen_Ghw.flatten(1).long().cumsum(1) - 1).view_as(chosen_Ghw)


def _spread(cell_Ghw: Tensor, side: int, grid: tuple[int, ...]) -> Tensor:
    """Every cell's value at each of its tokens; 0 (false) where the edge leaves no whole cell."""
    whole_GHW = cell_Ghw.repeat_interleave(side, 1).repeat_interleave(side, 2)
    missing = [n - m for n, m in zip(grid, whole_GHW.shape[1:], strict=True)]
    return F.pad(whole_GHW, (0, missing[1], 0, missing[0]))
