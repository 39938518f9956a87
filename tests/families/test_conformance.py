"""Every described family, on a tiny random checkpoint of its own, through one suite.

A family is a `Case` in one of the `tiny_*.py` files beside this one. What it must do: a plan that only permutes the
tokens changes nothing (and changes something where a side input stays behind); presets run at two sizes, batched and
guided; the pipeline is exactly restored; a run repeats itself.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby

import pytest
import torch
from case import of_all

import accel
from accel.core.plan import TokenPlan
from accel.core.span import Span
from accel.pipelines.registry import find

CASES = of_all("tiny_*.py", "CASES")


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def relative(a, b):
    return ((a - b).float().norm() / b.float().norm()).item()


def denoiser_of(pipe):
    return getattr(pipe, "transformer", None) or pipe.unet


def permuted(pipe, case, sites, tokens, rows, **options):
    """Latents with all blocks running on permuted tokens."""

    def plan_for(x):
        generator = torch.Generator().manual_seed(9)
        orders = [torch.randperm(x.shape[1], generator=generator) for _ in range(rows)]
        plan = TokenPlan.permutation(torch.stack(orders))
        return plan if rows == 1 else plan.repeat(x.shape[0] // rows)

    with ExitStack() as stack:
        for _, stretch in groupby(sites, key=lambda site: site.stretch):
            Span(plan_for, tokens=lambda: tokens).attach(denoiser_of(pipe), list(stretch), stack, bias=False)
        return case.latents(pipe, **options)


def test_permutation(case):
    pipe = case.make()
    tokens = find(denoiser_of(pipe)).tokens
    if tokens is None:
        pytest.skip("tokens are not described")
    sites = tokens.sites(denoiser_of(pipe))
    plain = case.latents(pipe, steps=case.steps)
    rows = 1 if tokens.shared_plan else case.batch
    assert (
        relative(permuted(pipe, case, sites, case.tokens + case.references, rows, steps=case.steps), plain)
        <= 1e-5
    )
    if case.positions == "sides":
        # The negative control: the same with nothing travelling along.
        alone = [replace(site, sides=()) for site in sites]
        assert (
            relative(permuted(pipe, case, alone, case.tokens + case.references, 1, steps=case.steps), plain)
            > 1e-3
        )


def test_presets_run_and_are_taken_out_exactly(case):
    pipe = case.make()
    denoiser = denoiser_of(pipe)
    plain = case.latents(pipe, steps=10)
    presets = ["balanced"] + ([] if find(denoiser).tokens is None else ["few-step", "merging"])
    for preset in presets:
        with accel.accelerate(pipe, preset) as handle:
            first = case.latents(pipe, steps=10)
            assert torch.isfinite(first).all()
            # Of the image's tokens; those of references are merged into nothing.
            assert 1 - handle.stats.share > 0.05 * case.tokens / (case.tokens + case.references)
            assert torch.equal(case.latents(pipe, steps=10), first)
            case.latents(pipe, steps=10, wide=True)
        assert torch.equal(case.latents(pipe, steps=10), plain)
        assert relative(first, plain) > 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in denoiser.modules())


def test_tokens_are_read_and_written_where_they_are(case):
    """`of`, `put` and `spread` say the same about a prediction."""
    pipe = case.make()
    denoiser = denoiser_of(pipe)
    tokens = find(denoiser).tokens
    if tokens is None:
        pytest.skip("tokens are not described")
    with accel.accelerate(pipe, accel.ForecastConfig(cycle=(0, 1))):
        run = pipe.scheduler.step.accel_clock.listeners[0]
        seen = []
        account = run.method.account
        run.method.account = lambda r: seen.append((r.outputs[0], r.grid)) or account(r)
        case.latents(pipe, steps=4)
    prediction, grid = seen[-1]
    assert grid is not None, "the grid could not be told"
    assert grid[0] * grid[1] == case.tokens
    x_BNc = tokens.of(denoiser, prediction, grid)
    assert x_BNc.shape[:2] == (prediction.shape[0], case.tokens)
    assert torch.equal(tokens.put(denoiser, prediction, x_BNc, grid), prediction)
    marked = tokens.put(denoiser, prediction, x_BNc + 1, grid)
    torch.testing.assert_close(tokens.of(denoiser, marked, grid), x_BNc + 1)
    if tokens.spread is None:
        return
    mask = torch.zeros(prediction.shape[0], case.tokens + case.references)
    mask[:, case.tokens // 3] = 1
    spread = tokens.spread(denoiser, mask, grid).expand_as(prediction)
    touched = tokens.of(denoiser, torch.where(spread > 0, prediction + 1, prediction), grid)
    changed = (touched - x_BNc).abs().sum(-1) > 0.5
    assert torch.equal(changed, mask[:, : case.tokens] > 0)


def test_bfloat16(case):
    pipe = case.make()
    denoiser_of(pipe).to(torch.bfloat16)
    with accel.accelerate(pipe, "balanced"):
        assert torch.isfinite(case.latents(pipe, steps=10, dtype=torch.bfloat16)).all()
