"""Every kernel against float64, at sizes with tails. Not collected by its name: `test_interpreter.py` runs it in
Triton's interpreter on the CPU, `test_gpu.py` on a GPU.

What a kernel does not write must show: `poisoned` fills fresh memory with NaN and with the largest whole numbers.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch

from accel.kernels.detail import triton as detail_kernel
from accel.kernels.dispatch import INTERPRETED
from accel.kernels.forecast import triton as forecast_kernel
from accel.kernels.match import triton as match_kernel
from accel.kernels.merge import triton as merge_kernel
from accel.kernels.plan import triton as plan_kernel
from accel.kernels.unmerge import triton as unmerge_kernel
from accel.kernels.verify import triton as verify_kernel

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: Of one rounding at the end, relative to values of size 1.
EPSILON = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@contextmanager
def poisoned():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def check(found, truth, dtype=torch.float32):
    truth = truth.to(found.device)
    error = (found.double() - truth).abs() / (1 + truth.abs())
    assert float(error.max()) <= EPSILON[dtype]  # a NaN left over fails, too


def test_poison_is_in_fresh_memory():
    with poisoned():
        assert torch.empty(3, device=DEVICE).isnan().all()
        assert torch.empty(2, device=DEVICE).new_empty(3).isnan().all()
        assert torch.empty_like(torch.ones(3, device=DEVICE)).isnan().all()


# match


def similarities(x, dst):
    """(G, N, M) cosine similarity, averaged over copies, in float64."""
    unit = torch.nn.functional.normalize(x.double(), dim=-1).unflatten(0, (-1, dst.shape[0]))
    there = torch.stack([torch.stack([copy[g, dst[g]] for g in range(dst.shape[0])]) for copy in unit])
    return (unit @ there.transpose(-1, -2)).mean(0)


def check_match(x, dst, exempt, found, tolerance):
    best, target = found
    truth = similarities(x, dst)
    column = (target[..., None] == dst[:, None]).float().argmax(2)
    assert torch.equal(dst.gather(1, column), target)
    sources = torch.ones_like(best, dtype=torch.bool).scatter(1, dst, False)
    if exempt is not None:
        sources &= ~exempt
    assert best[~sources].isneginf().all()
    most = truth.amax(2)
    chosen = truth.gather(2, column[..., None])[..., 0]
    assert float((most - chosen)[sources].abs().max()) <= tolerance
    assert float((best - most)[sources].abs().max()) <= tolerance
    return column


def destinations(rows, N, M, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(N, generator=generator)[:M].sort().values for _ in range(rows)]).to(
        DEVICE
    )


@dtypes
@pytest.mark.parametrize(("rows", "copies"), [(1, 1), (2, 2)])
def test_match(dtype, rows, copies):
    x, dst = randn(rows * copies, 70, 72, dtype=dtype), destinations(rows, 70, 66)
    x[:, 1] = 0  # a token without direction
    exempt = randn(rows, 70, seed=2) > 1
    with poisoned():
        found = match_kernel.match(x, dst, exempt)
    check_match(x, dst, exempt, found, 1e-5)
    with pytest.raises(AssertionError):  # the neighbours of other destinations
        check_match(x.flip(1), dst, exempt, found, 1e-5)


def test_match_takes_the_first_of_equals():
    x = torch.randint(-2, 3, (1, 60, 32), generator=torch.Generator().manual_seed(0)).float().to(DEVICE)
    dst = destinations(1, 60, 20)
    x[0, dst[0, 10:]] = x[0, dst[0, :10]]  # whole numbers: sums are exact in any order
    column = check_match(x, dst, None, match_kernel.match(x, dst, None), 1e-6)
    assert (column < 10).all()


# plan


def plan_in_loops(best, target, keep):
    """The members of every slot in plain Python, of equals the first ones merged."""
    N = len(best)
    merged = set(sorted(range(N), key=lambda n: (-best[n], n))[: N - keep])
    kept = [n for n in range(N) if n not in merged]
    slot = {n: k for k, n in enumerate(kept)}
    owner = [slot[target[n]] if n in merged else slot[n] for n in range(N)]
    return kept, owner


def check_plan(best, target, keep, found):
    dst, owner, size, segments = found
    for g in range(best.shape[0]):
        want_dst, want_owner = plan_in_loops(best[g].tolist(), target[g].tolist(), keep)
        assert dst[g].tolist() == want_dst
        assert owner[g].tolist() == want_owner
        check_lists(owner[g], size[g], segments[g], keep)


def check_lists(owner, size, segments, slots):
    lists = [[n for n, k in enumerate(owner.tolist()) if k == slot] for slot in range(slots)]
    begins, members = segments[: slots + 1].tolist(), segments[slots + 1 :].tolist()
    assert size.tolist() == [len(members_) for members_ in lists]
    assert [members[a:b] for a, b in pairwise(begins)] == lists
    assert sorted(members) == list(range(len(members)))


@pytest.mark.parametrize("levels", [None, 4, 0.1])
def test_plan(levels):
    """Ties: few levels; all equal."""
    rows, N, M, keep = 2, 77, 19, 40
    dst = destinations(rows, N, M)
    best = randn(rows, N).tanh()
    if levels:
        best = (best * levels).round() / levels
    best = best.scatter(1, dst, -math.inf)
    target = dst.gather(
        1, torch.randint(0, M, (rows, N), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    )
    with poisoned():
        found = plan_kernel.plan(best, target, keep)
    check_plan(best, target, keep, found)
    with pytest.raises(AssertionError):
        check_plan(best, target, keep, plan_kernel.plan(-best.clamp(min=-9), target, keep))


@pytest.mark.parametrize("case", ["holes", "one holds all", "none", "empty slots"])
def test_segments(case):
    owner = torch.randint(-1, 9, (2, 50), generator=torch.Generator().manual_seed(0))
    owner = {
        "holes": owner,
        "one holds all": owner * 0 + 3,
        "none": owner * 0 - 1,
        "empty slots": owner.clamp(2, 5),
    }[case].to(DEVICE)
    with poisoned():
        size, segments = plan_kernel.segments(owner, 9)
    for g in range(2):
        check_lists(owner[g], size[g], segments[g], 9)


# merge and unmerge


def mean_in_loops(x, owner, slots):
    out = torch.zeros(x.shape[0], slots, x.shape[2], dtype=torch.float64)
    for b in range(x.shape[0]):
        mine = owner[b % owner.shape[0]].tolist()
        for k in range(slots):
            members = [x[b, n].double().cpu() for n, slot in enumerate(mine) if slot == k]
            if members:
                out[b, k] = torch.stack(members).mean(0)
    return out


def owners(rows, N, slots, lowest, seed=4):
    return torch.randint(lowest, slots, (rows, N), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@dtypes
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("channels", [37, 64, 1160])
def test_merge(dtype, rows, channels):
    x, owner = randn(2, 33, channels, dtype=dtype), owners(rows, 33, 12, -1)
    owner[owner == 5] = 6  # an empty slot
    with poisoned():
        size, segments = plan_kernel.segments(owner, 12)
        found = merge_kernel.merge(x, owner, size, segments)
        again = merge_kernel.merge(x, owner, size, None)
    truth = mean_in_loops(x, owner, 12)
    check(found, truth, dtype)
    assert torch.equal(found, again)
    assert (found[:, 5] == 0).all()
    with pytest.raises(AssertionError):
        check(found, mean_in_loops(x, owner.flip(1), 12), dtype)


def test_merge_of_one_slot_that_holds_all():
    x, owner = randn(1, 301, 40), torch.full((1, 301), 2, device=DEVICE)
    size, segments = plan_kernel.segments(owner, 4)
    check(merge_kernel.merge(x, owner, size, segments), mean_in_loops(x, owner, 4))


def test_merge_without_divisor():
    """The negative control of the last test: a sum is not a mean."""
    x, owner = randn(1, 301, 40), torch.full((1, 301), 2, device=DEVICE)
    size, segments = plan_kernel.segments(owner, 4)
    with pytest.raises(AssertionError):
        check(merge_kernel.merge(x, owner, size, segments), 301 * mean_in_loops(x, owner, 4))


@dtypes
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("channels", [37, 1160, 1024])
@pytest.mark.parametrize("residual", [True, False])
def test_unmerge(dtype, rows, channels, residual):
    full, y = randn(2, 29, channels, dtype=dtype), randn(2, 11, channels, dtype=dtype, seed=1)
    reduced = randn(2, 11, channels, dtype=dtype, seed=2) if residual else None
    owner = owners(rows, 29, 11, -1)
    with poisoned():
        found = unmerge_kernel.unmerge(full, y, reduced, owner, False)

    def truth(owner):
        change = y.double() - (reduced.double() if residual else 0)
        out = full.double().clone()
        for b in range(2):
            for n, k in enumerate(owner[b % rows].tolist()):
                if k >= 0:
                    out[b, n] += change[b, k]
        return out

    check(found, truth(owner), dtype)
    with pytest.raises(AssertionError):
        check(found, truth(owner.flip(1)), dtype)


# detail


def detail_in_loops(x, height, width):
    maps = x.double().cpu().unflatten(1, (height, width))
    variance, edge = (torch.zeros(x.shape[0], height, width, dtype=torch.float64) for _ in range(2))
    at = lambda h, w: maps[:, min(max(h, 0), height - 1), min(max(w, 0), width - 1)]  # noqa: E731
    for h in range(height):
        for w in range(width):
            around = torch.stack([at(h + i, w + j) for i in (-1, 0, 1) for j in (-1, 0, 1)])
            variance[:, h, w] = around.var(0, correction=0).sum(-1)
            across, down = at(h, w + 1) - at(h, w - 1), at(h + 1, w) - at(h - 1, w)
            edge[:, h, w] = (across.square() + down.square()).sum(-1).sqrt()
    scaled = (score / score.mean((1, 2), keepdim=True) for score in (variance, edge))
    return sum(share * score for share, score in zip((0.3, 0.7), scaled, strict=True)).flatten(1)


@dtypes
@pytest.mark.parametrize(("grid", "channels"), [((10, 3), 40), ((2, 4), 520)])
def test_detail(dtype, grid, channels):
    x = randn(2, grid[0] * grid[1], channels, dtype=dtype)
    with poisoned():
        found = detail_kernel.detail(x, *grid)
    check(found, detail_in_loops(x, *grid))
    with pytest.raises(AssertionError):
        check(found, detail_in_loops(x, *reversed(grid)))


# forecast


STAMPS = {"scalar": (), "per token": (2, 9, 1), "per pixel": (2, 1, 4, 5)}


def newton(values, stamps, now, trend):
    """Lagrange's form, another one than the kernel's, over the values that are there."""
    values = [v.double() for v in values]
    stamps = [s.double() for s in stamps]
    there = [~s.isnan() for s in stamps]
    result = torch.zeros_like(values[0])
    for i, value in enumerate(values):
        weight = torch.ones_like(stamps[0])
        for j in range(len(values)):
            if j != i:
                factor = (now - stamps[j]) / (stamps[i] - stamps[j])
                weight = weight * torch.where(there[j], factor, 1.0)
        result = result + torch.where(there[i], weight * value, 0.0)
    return values[0] + trend * (result - values[0])


@dtypes
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("layout", STAMPS)
def test_forecast(dtype, order, layout):
    shape = (2, 3, 4, 5) if layout == "per pixel" else (2, 9, 70)
    values = [randn(*shape, dtype=dtype, seed=i) for i in range(order + 1)]
    stamps = [randn(*STAMPS[layout], seed=9) * 0.1 - i for i in range(order + 1)]
    if layout != "scalar":
        stamps[-1].view(-1)[::3] = math.nan  # the oldest value is not there
    with poisoned():
        found = forecast_kernel.forecast(values, stamps, 0.5, 0.75)
    check(found, newton(values, stamps, 0.5, 0.75), dtype)
    with pytest.raises(AssertionError):
        check(found, newton(values, stamps, 0.5, 1.0), dtype)


@dtypes
def test_correct(dtype):
    a, b = (randn(3, 7, 50, dtype=dtype, seed=i) for i in range(2))
    missed, share = randn(3, 7, 50, seed=3), torch.tensor(0.4, device=DEVICE)
    with poisoned():
        found = forecast_kernel.correct(a, b, missed, share)
    truth = a.double() + 0.4 * (a.double() - b.double()) - missed.double()
    check(found, truth, dtype)
    with pytest.raises(AssertionError):
        check(found, truth + missed, dtype)


# verify


def draw_in_loops(logits, noise, slot, temperature, top_k):
    """(scores of the tokens, -1 where top-k leaves them out) in float64."""
    B, W, V = logits.shape
    scores = torch.full((B, W, V), -1.0, dtype=torch.float64)
    for b in range(B):
        for w in range(W):
            row = (logits[b, w].double() / temperature).cpu()
            allowed = row >= row.sort(descending=True).values[(top_k or V) - 1]
            p = torch.where(allowed, row.exp(), 0.0)
            exponential = noise[b, int(slot[b, w]) % noise.shape[1]].double().cpu()
            scores[b, w] = torch.where(allowed, p / p.sum() / exponential, -1.0)
    return scores


@dtypes
@pytest.mark.parametrize(("vocabulary", "top_k"), [(90, 30), (128, None), (90, 1), (90, 90), (50, 7)])
def test_verify(dtype, vocabulary, top_k):
    logits = randn(2, 3, vocabulary, dtype=dtype) * 2
    if vocabulary == 50:
        logits = logits.round()  # ties at the threshold
    noise = -torch.rand(2, 7, vocabulary, generator=torch.Generator().manual_seed(1)).clamp(min=1e-6).log()
    noise, slot = noise.to(DEVICE), torch.tensor([[3, 4, 5], [6, 7, 8]], device=DEVICE)
    with poisoned():
        found = verify_kernel.verify(logits, noise, slot, 0.8, top_k).cpu()
    scores = draw_in_loops(logits, noise, slot, 0.8, top_k)
    best = scores.amax(-1)
    chosen = scores.gather(-1, found[..., None])[..., 0]
    assert float((best - chosen).abs().div(best).max()) < 1e-4
    if top_k != 1:  # the negative control: other slots' noise
        other = draw_in_loops(logits, noise, slot + 1, 0.8, top_k)
        assert (other.argmax(-1) != found).any()


def test_verify_of_what_is_no_number():
    """The token is in the vocabulary all the same."""
    noise, slot = torch.ones(1, 4, 40, device=DEVICE), torch.zeros(1, 2, dtype=torch.int64, device=DEVICE)
    found = verify_kernel.verify(torch.full((1, 2, 40), math.nan, device=DEVICE), noise, slot, 1.0, 5)
    assert ((found >= 0) & (found < 40)).all()
