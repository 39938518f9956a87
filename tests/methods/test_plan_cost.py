"""Choosing tokens, merging them and handing results back must stay small beside what is saved."""

import time

import pytest
import torch

import accel
from accel.core.plan import TokenPlan
from accel.generation import load_pipeline
from accel.methods.merging.engine import TokenMerging


@pytest.mark.parametrize("groups", ["windows", "matching"])
def test_plans_take_a_twentieth_of_a_forward_at_most(groups, monkeypatch):
    """The built-in model at 256 px, a new plan at every step; everything is timed in the same run."""
    spent = {"plans": 0.0, "denoiser": 0.0}

    def timed(owner, name, what):
        method = getattr(owner, name)

        def measured(*args, **kwargs):
            start = time.thread_time()
            try:
                return method(*args, **kwargs)
            finally:
                spent[what] += time.thread_time() - start

        monkeypatch.setattr(owner, name, measured)

    pipe, threads = load_pipeline("builtin"), torch.get_num_threads()
    call = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    torch.set_num_threads(1)  # this thread's time is all the time there is
    try:
        timed(pipe.transformer, "forward", "denoiser")
        pipe("a photo of three stars", **call)
        forward = spent["denoiser"] / 4
        timed(TokenMerging, "build", "plans")
        for name in ("reduce", "expand", "change"):
            timed(TokenPlan, name, "plans")
        config = accel.TokenMergingConfig(
            ratio=0.5, groups=groups, schedule=accel.Schedule(refresh_every=1, dense_first=1, dense_last=0)
        )
        with accel.accelerate(pipe, config) as handle:
            pipe("a photo of three stars", **call)
    finally:
        torch.set_num_threads(threads)
    reduced = sum(0 < step.computed < step.total for step in handle.stats.steps)
    assert reduced == 3, "plans were made"
    share = spent["plans"] / reduced / forward
    print(f"{groups}: {share:.2%} of a plain forward")
    assert 0 < share <= 0.05
