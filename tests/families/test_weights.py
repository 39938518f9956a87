"""In every family a slot weighs in attention as many tokens as it stands for, and stands at their centre: windows give what the
model gives when every token of a window is replaced by the window's mean, in its place."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace

import pytest
import torch
from case import Case
from recipes_transformers import RECIPES
from test_conformance import CASES, denoiser_of, relative

from accel.core.plan import TokenPlan
from accel.core.span import Span
from accel.methods import windows
from accel.pipelines.registry import find


@dataclass(frozen=True)
class Repeated(TokenPlan):
    """A plan's slots, each as often as it stands for tokens: what attention with sizes is equal to, without any bias."""

    inner: TokenPlan | None = None

    @staticmethod
    def of(plan: TokenPlan) -> Repeated:
        dst = plan.dst.gather(1, plan.owner)
        return Repeated(
            dst, plan.owner, torch.ones(dst.shape), centroid=True, classes=((1, dst.shape[1]),), inner=plan
        )

    @property
    def slots(self) -> int:
        return self.tokens

    def reduce(self, x):
        return self.inner.expand(self.inner.reduce(x))

    def expand(self, y):
        return y

    def change(self, x, y, reduced=None):
        return x + (y if reduced is None else y - reduced)

    def repeat(self, times):
        return Repeated.of(self.inner.repeat(times))


GRID = (8, 12)

#: Where repeated tokens are not as one, for reasons of the model's own.
UNLIKE = {
    "Nucleus": "its experts choose among the tokens there are",
    "Lumina-Next": "it scales its softmax by the number of tokens it is given",
}


def latents(pipe, case, plan, *, bias):
    denoiser = denoiser_of(pipe)
    adapter = find(denoiser)

    def plan_for(x):
        return plan if adapter.tokens.shared_plan else plan.repeat(x.shape[0] // len(plan.dst))

    with ExitStack() as stack:
        sites = [site for site in adapter.tokens.sites(denoiser) if site.scale == 1]
        Span(plan_for, tokens=lambda: 96).attach(denoiser, sites, stack, bias=bias)
        return case.latents(pipe, steps=case.steps)


@pytest.mark.parametrize("name", CASES)
def test_a_window_is_as_heavy_as_its_tokens(name):
    if name in UNLIKE:
        pytest.skip(UNLIKE[name])
    case = CASES[name]
    pipe = case.make()
    adapter = find(denoiser_of(pipe))
    if adapter.tokens is None or case.tokens != 96 or adapter.tokens.convolutional or case.references:
        pytest.skip(
            "another grid, or tokens are not described; with references, the blocks are the same family's"
        )
    weigh(pipe, case)


def test_so_it_is_where_attention_gets_two_of_three_branches():
    """Perturbed-attention guidance splits the batch inside of attention; every image has a plan of its own here."""
    recipe = RECIPES["HunyuanDiTPAGPipeline"]
    weigh(
        recipe.make(),
        Case(recipe.make, lambda steps, **_: {**recipe.call(), "num_inference_steps": steps}, 96),
    )


def weigh(pipe, case):
    adapter = find(denoiser_of(pipe))
    assert "key bias" in adapter.has(denoiser_of(pipe))
    rows = 1 if adapter.tokens.shared_plan else case.batch
    score = torch.rand(rows, 96, generator=torch.Generator().manual_seed(4))
    plan = windows.plan(score, GRID, windows.Counts(96, 1, 8))
    wanted = latents(pipe, case, Repeated.of(plan), bias=False)
    assert relative(latents(pipe, case, plan, bias=True), wanted) <= 1e-5
    # In no order, as matched groups are.
    assert relative(latents(pipe, case, replace(plan, classes=()), bias=True), wanted) <= 1e-5
    # The negative control: each counted once.
    assert relative(latents(pipe, case, plan, bias=False), wanted) > 1e-4
