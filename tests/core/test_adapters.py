"""Every adapter, every family: exactness where it must be exact, and the negative controls."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES, make_flux
from diffusers.utils import BaseOutput

import accel
from accel.core.capability import denoisers_of
from accel.core.plan import TokenPlan
from accel.core.prediction import like, prediction_of, put
from accel.core.site import Side
from accel.core.span import Span
from accel.pipelines.registry import find

HALF = accel.TokenMergingConfig(ratio=0.5, schedule=accel.Schedule(refresh_every=2))


def permuted(family, pipe, sites, stretches, rows=1, **options):
    """Latents with the blocks of each stretch running on permuted tokens."""

    def plan_for(x):
        g = torch.Generator().manual_seed(9)
        return TokenPlan.permutation(
            torch.stack([torch.randperm(x.shape[1], generator=g) for _ in range(rows)])
        )

    with ExitStack() as stack:
        for stretch in stretches:
            Span(plan_for).attach(denoisers_of(pipe)[0][1], [sites[i] for i in stretch], stack, bias=False)
        return family.latents(pipe, **options)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("scope", ["span", "block"])
def test_permutation(family, scope):
    pipe = family.make()
    adapter = find(pipe.transformer)
    sites = adapter.tokens.sites(pipe.transformer)
    everything = range(len(sites))
    stretches = [everything] if scope == "span" else [[i] for i in everything]
    options = {"steps": 1, "batch": 2}
    plain = family.latents(pipe, **options)
    rows = 1 if adapter.tokens.shared_plan else 2
    assert relative(permuted(family, pipe, sites, stretches, rows, **options), plain) <= 1e-6


def test_permutation_notices_a_rotary_table_that_does_not_follow():
    # The negative control: the same test, with the table left in the order of the grid.
    family, pipe = FAMILIES["flux"], make_flux()
    keep = Side("image_rotary_emb", lambda get, plan: get("image_rotary_emb"))
    sites = [replace(s, sides=(keep,)) for s in find(pipe.transformer).tokens.sites(pipe.transformer)]
    plain = family.latents(pipe, steps=1)
    assert relative(permuted(family, pipe, sites, [range(len(sites))], steps=1), plain) > 1e-2


def state(pipe):
    """Everything that attaching could leave behind, as comparable values."""
    hooks = (
        "_forward_pre_hooks",
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
    )
    modules = {
        name: (type(m), set(vars(m)), [list(vars(m)[h]) for h in hooks], m.forward)
        for name, m in pipe.transformer.named_modules()
    }
    return modules, set(vars(pipe)), type(pipe), set(vars(pipe.scheduler)), pipe.scheduler.step


@pytest.mark.parametrize("case", ["plain", "guided", "odd"])
def test_removal_restores_outputs_and_state(family, case):
    options = {"plain": {}, "guided": {"guidance": 3.0, "batch": 2}, "odd": family.odd}[case]
    pipe = family.make()
    plain = family.latents(pipe, **options)
    before = state(pipe)
    handle = accel.accelerate(pipe, HALF)
    changed = family.latents(pipe, **options)
    assert relative(changed, plain) > 1e-3  # it did something
    assert relative(changed, plain) < 1  # and not nonsense
    handle.remove()
    handle.remove()
    assert state(pipe) == before
    assert torch.equal(family.latents(pipe, **options), plain)


class Interrupted(Exception):
    pass


def test_an_exception_in_the_loop_leaves_nothing(family):
    pipe = family.make()
    plain = family.latents(pipe)
    before = state(pipe)
    clean = family.make()
    with accel.accelerate(clean, HALF):
        expected = family.latents(clean)

    calls = []

    def fail(module, args):
        calls.append(1)
        if len(calls) == 4:
            raise Interrupted

    handle = accel.accelerate(pipe, HALF)
    bomb = pipe.transformer.transformer_blocks[-1].register_forward_pre_hook(fail)
    with pytest.raises(Interrupted):
        family.latents(pipe)
    bomb.remove()
    group = handle_run(pipe).method.groups[0]
    assert group.plan is None
    assert group.spans[0][0].full is None
    assert torch.equal(family.latents(pipe), expected)  # the next run is like the first on a fresh pipeline
    with pytest.raises(Interrupted), handle:
        raise Interrupted
    assert state(pipe) == before
    assert torch.equal(family.latents(pipe), plain)


def handle_run(pipe):
    return next(iter(pipe.scheduler.step.accel_clock._listeners))


def test_ratio_zero_is_the_identity_and_says_so(family):
    pipe = family.make()
    plain = family.latents(pipe)
    with pytest.warns(accel.AccelWarning, match="merges nothing"):
        handle = accel.accelerate(pipe, accel.TokenMergingConfig(ratio=0))
    assert torch.equal(family.latents(pipe), plain)
    assert handle.stats.share == 1


def test_initial_noise_is_the_same(family):
    pipe = family.make()
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs.get("hidden_states", args[0] if args else None).clone()),
        with_kwargs=True,
    )
    after_plain = torch.Generator().manual_seed(5)
    after_accelerated = torch.Generator().manual_seed(5)
    torch.manual_seed(1)
    family.latents(pipe, generator=after_plain, steps=3)
    global_plain = torch.get_rng_state()
    torch.manual_seed(1)
    with accel.accelerate(pipe, HALF):
        family.latents(pipe, generator=after_accelerated, steps=3)
    assert torch.equal(seen[0], seen[3])
    assert torch.equal(after_plain.get_state(), after_accelerated.get_state())
    assert torch.equal(global_plain, torch.get_rng_state())


def test_runs_repeat_and_sizes_do_not_leak(family):
    pipe = family.make()
    with accel.accelerate(pipe, HALF):
        first = family.latents(pipe)
        family.latents(pipe, height=48, width=32)  # as many tokens, another grid
        family.latents(pipe, batch=2, guidance=3.0)
        again = family.latents(pipe)
    assert torch.equal(first, again)


def test_images_of_a_batch(family):
    """Per-image plans make an image independent of its batch; a shared plan cannot, and is not asked to."""
    pipe = family.make()
    config = replace(HALF, matching=accel.Matching(importance="detail"))
    with accel.accelerate(pipe, config):
        both = family.latents(pipe, batch=2, guidance=3.0, generator=generators(0, 1))
        alone = family.latents(pipe, batch=2, guidance=3.0, generator=generators(0, 2))
    if find(pipe.transformer).tokens.shared_plan:
        assert relative(both[0], alone[0]) < 0.5
    else:
        assert relative(both[0], alone[0]) < 1e-5
    assert relative(both[1], alone[1]) > 0.1


def generators(*seeds):
    return [torch.Generator().manual_seed(s) for s in seeds]


def test_compiled_equals_eager(family):
    """fullgraph, before and after attaching, guidance in two calls (FLUX) and batched (PixArt).

    aot_eager traces as inductor does and keeps eager's arithmetic: a difference is a wrong graph, not rounding.
    """
    pipe = family.make(**family.shallow)
    options = {"guidance": 3.0, "steps": 5}
    plain = family.latents(pipe, **options)
    with accel.accelerate(pipe, HALF):
        expected = family.latents(pipe, **options)
    eager = pipe.transformer

    pipe.transformer = torch.compile(eager, fullgraph=True, backend="aot_eager")
    assert relative(family.latents(pipe, **options), plain) < 1e-5
    with accel.accelerate(pipe, HALF) as handle:  # compiled and already run, then attached
        assert relative(family.latents(pipe, **options), expected) < 1e-5
        assert handle.stats.plans_built == 2
        assert handle.stats.calls == (10 if family is FAMILIES["flux"] else 5)
        torch._dynamo.utils.counters.clear()
        family.latents(pipe, **{**options, "steps": 9})
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0  # no graph per step

    pipe.transformer = eager
    with accel.accelerate(
        pipe, HALF
    ):  # attached, then compiled; backend "eager" only traces, which is quicker
        expected = family.latents(pipe, steps=4)
        pipe.transformer = torch.compile(eager, fullgraph=True, backend="eager")
        assert relative(family.latents(pipe, steps=4), expected) < 1e-5
        pipe.transformer = eager


def test_blocks_compiled_one_by_one_share_their_graphs():
    """Regional compilation of a deep model: with a hook object per block this runs into the recompile limit."""
    family = FAMILIES["flux"]
    pipe = make_flux(single=9)
    with accel.accelerate(pipe, HALF):
        expected = family.latents(pipe, steps=4)
        torch._dynamo.utils.counters.clear()
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
        assert relative(family.latents(pipe, steps=4), expected) < 1e-5


def test_an_output_class_of_any_kind_has_its_prediction_in_sample():
    """A denoiser of one's own need not decorate it as diffusers does."""

    class Output(BaseOutput):
        sample: torch.Tensor

    value, other = torch.zeros(2), torch.ones(2)
    for output in (Output(sample=value), SimpleNamespace(sample=value)):
        assert prediction_of(output) is value
        assert prediction_of(put(output, other)) is other
        assert prediction_of(like(output)(other)) is other
