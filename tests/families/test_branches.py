"""Which branch of guidance is the conditional one is read off what the pipeline does with its predictions."""

from __future__ import annotations

import pytest
import torch
from test_conformance import CASES, denoiser_of

from accel.core.prediction import prediction_of
from accel.pipelines.registry import find


def first_step(pipe, case):
    """(the predictions of the first step, the sample and what becomes of them at the scheduler)"""
    predictions, steps = [], []
    step = pipe.scheduler.step

    def record(model_output, timestep, sample, *args, **kwargs):
        steps.append((model_output, sample))
        return step(model_output, timestep, sample, *args, **kwargs)

    def keep(module, args, output):
        if not steps:
            predictions.append(prediction_of(output))

    pipe.scheduler.step = record
    handle = denoiser_of(pipe).register_forward_hook(keep)
    case.latents(pipe, steps=2)
    handle.remove()
    return predictions, *steps[0]


#: No two branches to tell apart: guidance is distilled, or each branch is a module and a shape of its own.
OTHERWISE = {"FLUX.1, modular", "FLUX.2", "HunyuanImage refiner", "Ideogram 4"}


@pytest.mark.parametrize("name", sorted(set(CASES) - OTHERWISE))
def test_the_declared_branch_is_the_conditional_one(name):
    """Guidance of scale 3 takes 3 times the conditional and -2 times the unconditional prediction, whatever it adds of
    the sample and however it scales the result: the larger share is the conditional one's."""
    case = CASES[name]
    pipe = case.make()
    branches = find(denoiser_of(pipe)).branches
    predictions, guided, sample = first_step(pipe, case)
    if len(predictions) == 1:
        halves, declared = predictions[0].chunk(2), branches.batched
        assert len(predictions[0]) == 2 * case.batch
    else:
        halves, declared = predictions, branches.calls
    assert declared in ("first", "second")
    # Without a learned variance; of a sample that is doubled for both branches, one half.
    channels = sample.shape[1] if sample.ndim == 4 else sample.shape[-1]
    halves = [half[:, :channels] if half.ndim == 4 else half for half in halves]
    # Without what is predicted for text in front of the image's own tokens, or for reference images behind them.
    own = slice(-sample.shape[1], None) if name.startswith("Qwen-Image 2.1") else slice(sample.shape[1])
    halves = [half[:, own] if half.ndim == 3 else half for half in halves]
    parts = [part[: case.batch].double().flatten() for part in (*halves, sample)]
    shares = torch.linalg.lstsq(
        torch.stack(parts, 1), guided[: case.batch].double().flatten()[:, None]
    ).solution
    first, second = shares[:2, 0].abs().tolist()
    ratio = first / second if declared == "first" else second / first
    assert 1.2 < ratio < 2  # 1.5 but for guidance that rescales norms
