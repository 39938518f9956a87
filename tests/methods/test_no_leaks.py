"""Two pipelines at once, other sizes, an error in the middle: every run is as on a fresh pipeline."""

from __future__ import annotations

import pytest
import torch

import accel

TOGETHER = {
    "pruning": (
        accel.TokenPruningConfig(cycle=(0.3, 0), selection=accel.Selection(clusters=4)),
        accel.TokenPruningConfig(cycle=(0.5,)),
    ),
    "corrected": (
        accel.ForecastConfig(cycle=(0, 1), correct="auto", dense_steps_first=2),
        accel.ForecastConfig(cycle=(0, 0, 1), correct="auto", dense_steps_last=0),
    ),
    "guidance": (
        accel.ForecastConfig(schedule=accel.Schedule(cycle=(1,), guidance_every=2)),
        accel.ForecastConfig(schedule=accel.Schedule(cycle=(0, 1), guidance_every=2)),
    ),
}


@pytest.mark.parametrize("which", TOGETHER)
def test_no_state_leaks_between_runs(family, which):
    config, beside = TOGETHER[which]
    runs = [{}, {"height": 48, "width": 32}, {"guidance": 3.0, "batch": 2}, family.odd, {}]
    if which == "guidance":
        runs = [{"guidance": 3.0, **options} for options in runs]

    def fresh(config, options):
        pipe = family.make()
        with accel.accelerate(pipe, config):
            return family.latents(pipe, **options)

    pipe, other = family.make(), family.make()
    plain = family.latents(pipe)
    with accel.accelerate(pipe, config), accel.accelerate(other, beside):
        expected = [fresh(config, options) for options in runs]
        for options, want in zip(runs, expected, strict=True):
            assert torch.equal(family.latents(pipe, **options), want)
            family.latents(other, **options)

        within = []

        def meanwhile(module, args):
            within.append(None if len(within) != 3 else family.latents(other, **runs[0]))

        visitor = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(meanwhile)
        assert torch.equal(family.latents(pipe, **runs[0]), expected[0])
        visitor.remove()
        assert torch.equal(within[3], fresh(beside, runs[0]))

        calls = []

        def fail(module, args, output):
            calls.append(1)
            if len(calls) == 3:  # within a partial step
                raise RuntimeError("in the middle")

        bomb = pipe.transformer.transformer_blocks[0].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            family.latents(pipe, **runs[0])
        bomb.remove()
        (run,) = pipe.scheduler.step.accel_clock.listeners
        assert run.method.state.history is None
        if which == "pruning":
            assert not run.method.kept.kept
        assert torch.equal(family.latents(pipe, **runs[0]), expected[0])
    assert torch.equal(family.latents(pipe), plain)
    hooks = [h for m in pipe.transformer.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert not hooks
