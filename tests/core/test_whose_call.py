"""Whose call is it? Only the followed loop's calls are forecast, merged or pruned; all others get the plain model."""

from __future__ import annotations

import copy
import dataclasses
import threading

import pytest
import torch
from conftest import FAMILIES, Watch, flux_call, freeze, make_flux
from diffusers import FluxPipeline

import accel
from accel.core.capability import Branches
from accel.errors import UnsupportedError
from accel.pipelines import registry

Config = accel.ForecastConfig
CYCLE = {"cycle": (0, 1), "dense_steps_first": 2, "dense_steps_last": 1}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def first_call():
    """Arguments of a denoiser's first call."""
    pipe, given = make_flux(), {}
    with Watch(pipe.transformer, lambda args, kwargs, output: given.setdefault("call", kwargs)):
        FAMILIES["flux"].latents(pipe)
    return given["call"]


def own_loop(pipe, calls_at, steps=8):
    """A loop of one's own that calls the model so often at each step, with guidance where it is called twice."""
    first = first_call()
    x = first["hidden_states"]
    pipe.scheduler.set_timesteps(steps, mu=0.5)
    for step, t in enumerate(pipe.scheduler.timesteps):
        call = {**first, "hidden_states": x, "timestep": t.expand(1) / 1000}
        out = pipe.transformer(**call)[0]
        for _ in range(calls_at(step) - 1):
            other = {**call, "encoder_hidden_states": -call["encoder_hidden_states"]}
            negative = pipe.transformer(**other)[0]
            out = negative + 3 * (out - negative)
        x = pipe.scheduler.step(out, t, x, return_dict=False)[0]
    return x


class Loop(FluxPipeline):
    """The same loop as a pipeline's."""

    def __call__(self, calls_at, steps=8):
        return own_loop(self, calls_at, steps)


def make_loop():
    pipe = Loop(**make_flux().components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_varying_number_of_calls_is_refused_where_it_is_not_known_which_they_are(monkeypatch):
    pipe = make_loop()
    undeclared = dataclasses.replace(registry.find(pipe.transformer), branches=Branches())
    monkeypatch.setitem(registry._REGISTERED, "FluxTransformer2DModel", undeclared)
    with (
        accel.accelerate(pipe, Config(**CYCLE)),
        pytest.raises(UnsupportedError, match="called 2 times at step 3"),
    ):
        pipe(lambda step: 2 if step >= 3 else 1)


@pytest.mark.parametrize(
    "calls_at", [lambda s: 2 if s >= 4 else 1, lambda s: 1 if s >= 5 else 2], ids=["on", "off"]
)
def test_guidance_that_comes_or_goes_starts_the_history_anew(calls_at):
    """FLUX says that the first call is the conditional one, so that calls may come and go: where they do, as many
    steps are computed as a forecast needs. On a denoiser that sees the same image at every step forecasts are then
    exact; one that continued a line from one branch to the other would be far off."""
    pipe = make_loop()
    freeze(pipe)
    plain, constant = pipe(calls_at, 12), pipe(lambda step: calls_at(0), 12)
    with accel.accelerate(pipe, Config(cycle=(0, 1), dense_steps_first=3)) as handle:
        got = pipe(calls_at, 12)
        computed = [int(step.computed > 0) for step in handle.stats.steps]
    # Changed at 4 (a computed step: one more is) or at 5 (one to be forecast: two more).
    on, off = [1, 1, 1, 0, 1, 1, 1, 0, 1, 0, 1, 1], [1, 1, 1, 0, 1, 0, 1, 1, 1, 0, 1, 1]
    assert computed == (on if calls_at(0) == 1 else off)
    assert relative(constant, plain) > 1e-2
    assert relative(got, plain) < 1e-5
    with (
        accel.accelerate(
            pipe, accel.TokenPruningConfig(cycle=(0.5, 1), keys_values="none", dense_steps_first=3)
        ),
        pytest.raises(UnsupportedError, match="Token pruning needs the same calls at every step"),
    ):
        pipe(calls_at, 12)


def test_in_a_loop_of_ones_own_a_line_that_its_first_step_does_not_have_is_nobodys():
    """So that two loops side by side in one function are two: guidance that comes later is computed plainly."""
    pipe = make_flux()
    freeze(pipe)
    calls_at = lambda s: 2 if s >= 4 else 1  # noqa: E731
    plain = own_loop(pipe, calls_at, 12)
    with accel.accelerate(pipe, Config(cycle=(0, 1), dense_steps_first=3)) as handle:
        assert relative(own_loop(pipe, calls_at, 12), plain) < 1e-5
        assert handle.stats.calls == 12  # the conditional branch's


def test_two_loops_in_lockstep_in_one_function():
    """Plain and accelerated beside each other, with a scheduler each."""
    pipe = make_flux()
    call, other = first_call(), copy.deepcopy(pipe.scheduler)

    def lockstep():
        x = y = call["hidden_states"]
        pipe.scheduler.set_timesteps(10, mu=0.5)
        other.set_timesteps(10, mu=0.5)
        for t in other.timesteps:
            fast = pipe.transformer(**{**call, "hidden_states": x, "timestep": t.expand(1) / 1000})[0]
            x = pipe.scheduler.step(fast, t, x, return_dict=False)[0]
            plain = pipe.transformer(**{**call, "hidden_states": y, "timestep": t.expand(1) / 1000})[0]
            y = other.step(plain, t, y, return_dict=False)[0]
        return x, y

    expected = lockstep()[1]
    with (
        accel.accelerate(pipe, Config(cycle=(0, 1), dense_steps_first=3)),
        pytest.warns(accel.AccelWarning, match="outside of a denoising loop"),  # the last plain call
    ):
        fast, plain = lockstep()
    assert torch.equal(plain, expected)
    assert not torch.equal(fast, expected)


@pytest.mark.filterwarnings("ignore:step 5 of a loop of 10 did not call")
def test_a_loop_whose_later_calls_come_another_way_goes_on_plainly():
    pipe = make_flux()
    call = first_call()

    def first(x, t):
        return pipe.transformer(**{**call, "hidden_states": x, "timestep": t.expand(1) / 1000})[0]

    def later(x, t):
        return pipe.transformer(**{**call, "hidden_states": x, "timestep": t.expand(1) / 1000})[0]

    def loop(change):
        x = call["hidden_states"]
        pipe.scheduler.set_timesteps(10, mu=0.5)
        for i, t in enumerate(pipe.scheduler.timesteps):
            x = pipe.scheduler.step((later if i >= change else first)(x, t), t, x, return_dict=False)[0]
        return x

    with accel.accelerate(pipe, Config(cycle=(0, 1), dense_steps_first=5)):
        changed, whole = loop(5), loop(10)
    assert torch.equal(changed, loop(10))  # five computed steps, then the plain loop
    assert not torch.equal(whole, changed)


def test_a_pipeline_that_shares_the_scheduler_and_fails_leaves_nothing_to_the_next():
    """The frame of its `__call__` is gone; the next pipeline's may have the same address."""
    pipe = make_flux()
    twin = FluxPipeline(**pipe.components)
    other = FluxPipeline(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
    for each in (twin, other):
        each.set_progress_bar_config(disable=True)
    plain = make(other, 11)

    class Stop(Exception):
        pass

    def stop(_, step, timestep, tensors):
        if step == 6:
            raise Stop
        return tensors

    with accel.accelerate(pipe, "balanced"):
        clock = pipe.scheduler.step.accel_clock
        for _ in range(3):
            with pytest.raises(Stop):
                make(twin, 3, callback_on_step_end=stop)
            assert not clock.running
            with pytest.warns(accel.AccelWarning, match="by another FluxPipeline"):
                assert torch.equal(make(other, 11), plain)


def test_a_call_by_somebody_else_is_computed_and_changes_nothing():
    """In a hook, in a callback: through other functions than those of the loop's first step."""
    pipe, family, others = make_flux(), FAMILIES["flux"], []

    def callback(pipe, step, timestep, tensors):
        if step < 5:  # after the last one no loop runs, and a warning says so
            others.append(pipe.transformer(**saved)[0])
        return tensors

    saved = first_call()
    expected = pipe.transformer(**saved)[0]
    with accel.accelerate(pipe, Config(**CYCLE)) as handle:
        alone = family.latents(pipe)
        calls = handle.stats.calls
        assert torch.equal(family.latents(pipe, callback_on_step_end=callback), alone)
        assert handle.stats.calls == 2 * calls
    assert len(others) == 5
    assert all(torch.equal(other, expected) for other in others)


# Threads. A pipeline that shares the denoiser and is not accelerated says that it is not.
UNFOLLOWED = pytest.mark.filterwarnings(
    "ignore:the denoiser was called outside of a denoising loop .by another"
)


def beside(pipe):
    """Another pipeline with the same denoiser and a scheduler of its own, as servers have one per request."""
    other = FluxPipeline(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
    other.set_progress_bar_config(disable=True)
    return other


def make(pipe, seed, **options):
    return pipe(**flux_call(steps=10, generator=torch.Generator().manual_seed(seed), **options)).images


def at_once(*jobs):
    """What each job gives, all started together in threads of their own."""
    results, start = [None] * len(jobs), threading.Barrier(len(jobs))

    def work(index, job):
        start.wait(20)
        try:
            results[index] = job()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=item) for item in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


CONFIGS = {
    "balanced": "balanced",
    "merging": "merging",
    "few-step": "few-step",
    "pruning": accel.TokenPruningConfig(cycle=(0.5, 1), dense_steps_first=3),
}


@UNFOLLOWED
@pytest.mark.parametrize("lock", [False, True], ids=["free", "locked"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("both", [False, True], ids=["one", "both"])
def test_two_threads_share_a_denoiser(name, both, lock):
    """One pipeline is accelerated, or both: every picture is the one that its pipeline makes alone."""
    pipe = make_flux(1, 2)
    other = beside(pipe)
    plain = make(other, 11)
    with accel.accelerate(pipe, CONFIGS[name]):
        handle = accel.accelerate(other, CONFIGS[name]) if both else None
        expected = make(pipe, 3), make(other, 11)
        assert torch.equal(expected[1], plain) == (not both)
        one = threading.Lock()

        def job(which, seed):
            if not lock:
                return make(which, seed)
            with one:
                return make(which, seed)

        for _ in range(3):
            got = at_once(lambda: job(pipe, 3), lambda: job(other, 11))
            for a, b in zip(got, expected, strict=True):
                assert isinstance(a, torch.Tensor), a
                assert torch.equal(a, b)
        if handle is not None:
            handle.remove()
        assert torch.equal(make(other, 11), plain)


@UNFOLLOWED
@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_two_threads_fifty_times(name):
    pipe = make_flux(1, 2)
    other = beside(pipe)
    with accel.accelerate(pipe, CONFIGS[name]):
        expected = make(pipe, 3), make(other, 11)
        wrong = 0
        for _ in range(50):
            got = at_once(lambda: make(pipe, 3), lambda: make(other, 11))
            wrong += sum(not torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert wrong == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pipeline_nested_in_a_callback(name):
    pipe = make_flux(1, 2)
    other = beside(pipe)
    plain = make(other, 11)
    nested = []

    def callback(_, step, timestep, tensors):
        if step in (4, 7):
            nested.append(make(other, 11))
        return tensors

    with accel.accelerate(pipe, CONFIGS[name]):
        alone = make(pipe, 3)
        assert torch.equal(make(pipe, 3, callback_on_step_end=callback), alone)
    assert len(nested) == 2
    assert all(torch.equal(picture, plain) for picture in nested)


def test_a_loop_in_which_another_model_is_called_is_not_ours():
    """The scheduler is shared, the transformer is not."""
    pipe, strange = make_flux(1, 2), make_flux(1, 1)
    strange.scheduler = pipe.scheduler
    plain = make(strange, 11)
    with accel.accelerate(pipe, "balanced") as handle:
        fast = make(pipe, 3)
        assert torch.equal(make(strange, 11), plain)
        assert handle.stats.runs == 1
        assert torch.equal(make(pipe, 3), fast)


def test_a_denoiser_that_was_replaced_is_named():
    pipe = make_flux(1, 2)
    with accel.accelerate(pipe, "balanced"):
        pipe.transformer = make_flux(1, 1).transformer
        with pytest.raises(UnsupportedError, match=r"denoiser was replaced.*handle\.remove"):
            make(pipe, 3)


@pytest.mark.filterwarnings("ignore:the loop of 10 steps never called")
def test_a_copy_taken_while_accelerated_is_plain():
    pipe = make_flux(1, 2)
    plain = make(pipe, 3)
    with accel.accelerate(pipe, "merging"), accel.accelerate(pipe, accel.ForecastConfig()):
        copied = copy.deepcopy(pipe.transformer)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in copied.modules())
        assert not {"_compiled_call_impl", "__deepcopy__"} & set(vars(copied))
        other = FluxPipeline(
            **{**pipe.components, "transformer": copied, "scheduler": copy.deepcopy(pipe.scheduler)}
        )
        other.set_progress_bar_config(disable=True)
        assert torch.equal(make(other, 3), plain)
        whole = copy.deepcopy(pipe)
        assert whole.progress_bar.__self__ is whole
        assert torch.equal(make(whole, 3), plain)
        assert not torch.equal(make(pipe, 3), plain)
