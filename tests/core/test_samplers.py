"""Every scheduler of diffusers, by results: what a loop under it gives where the right answer is known (`gaussian`).

`python tests/core/test_samplers.py` prints the table of docs/measured/schedulers.md.
"""

from __future__ import annotations

import inspect
import logging
import sys
from pathlib import Path

import diffusers
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from gaussian import SPREAD, Pipeline, levels, sample

import accel
from accel.core import samplers
from accel.errors import UnsupportedError

# diffusers' schedulers hand torch tensors to numpy 2 the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
logging.getLogger("diffusers").setLevel(logging.ERROR)
STEPS = 24

#: What cannot run here, and why; all others must.
NOT_RUN = {
    "AmusedScheduler": "draws discrete tokens",
    "BlockRefinementScheduler": "draws discrete tokens",
    "CogVideoXDPMScheduler": "video; its step takes the step before",
    "CosineDPMSolverMultistepScheduler": "needs torchsde",
    "DDPMWuerstchenScheduler": "timesteps are shares of the noise; adds noise",
    "DPMSolverSDEScheduler": "needs torchsde",
    "DiscreteDDIMScheduler": "draws discrete tokens",
    "EntropyBoundScheduler": "draws discrete tokens",
    "HeliosDMDScheduler": "video; stages of several sizes",
    "HeliosScheduler": "video; stages of several sizes",
    "IPNDMScheduler": "noise levels of its own",
    "KarrasVeScheduler": "two kinds of steps",
    "PiflowScheduler": "predictions of several grids",
    "RFD4ProteinaScheduler": "proteins",
    "RePaintScheduler": "its step takes the original picture and a mask",
    "SCMScheduler": "two steps only",
    "ScoreSdeVeScheduler": "two kinds of steps",
    "VQDiffusionScheduler": "draws discrete tokens",
}
#: Whose right answer is another one than the sampling of pictures.
OTHER_ANSWER = {"DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler", "MiniMaxH3Scheduler"}


def classes():
    names = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    found = {n: getattr(diffusers, n) for n in names}
    return {n: c for n, c in found.items() if inspect.isclass(c) and n != "Scheduler"}


def relative(a, b):
    return float((a - b).norm() / b.norm())


def facts(make):
    """(error of plain, distance that other noise makes, 0 for none, error of `balanced` or why it is refused, distance
    of that and plain)."""
    plain, right = sample(Pipeline(make()), STEPS)
    noisy = relative(sample(Pipeline(make()), STEPS, noise_seed=2)[0], plain)
    pipe = Pipeline(make())
    try:
        with accel.accelerate(pipe, "balanced") as handle:
            fast, _ = sample(pipe, STEPS)
            assert handle.stats.share < 0.6
    except UnsupportedError as error:
        return relative(plain, right), noisy, str(error), None
    return relative(plain, right), noisy, relative(fast, right), relative(fast, plain)


RUN = sorted(set(classes()) - set(NOT_RUN))


@pytest.mark.parametrize("name", RUN)
def test_a_scheduler_is_taken_or_refused_by_what_it_does(name):
    cls = classes()[name]
    plain_error, noisy, outcome, distance = facts(cls)
    second_order = getattr(cls(), "order", 1) > 1 or hasattr(cls(), "prk_timesteps")
    if isinstance(outcome, str):
        assert noisy or second_order
        assert ("adds noise" in outcome) == (noisy > 0 and not second_order)
        return
    assert not second_order
    if noisy:  # the picture that the same noise makes
        assert distance < 0.85 * noisy
        return
    # 0.26 of the first since gaps grow with the step.
    assert distance < (0.3 if name == "EDMDPMSolverMultistepScheduler" else 0.25)
    if name not in OTHER_ANSWER:
        assert plain_error < 0.25, "the harness: a deterministic sampler finds the answer"
        assert outcome < 0.35


#: Of those that cannot run here, the ones whose `step` draws nothing.
DETERMINISTIC = {
    "HeliosDMDScheduler",
    "HeliosScheduler",
    "IPNDMScheduler",
    "PiflowScheduler",
    "RFD4ProteinaScheduler",
}


def test_what_does_not_run_is_decided_by_name():
    assert set(NOT_RUN) - DETERMINISTIC <= samplers.ADD_NOISE


def test_eta_of_any_kind_of_number():
    import numpy as np

    for eta in (0.5, np.float32(0.5), torch.tensor(0.5)):
        assert "eta=0.5" in samplers.adds_noise(diffusers.DDIMScheduler(), {"eta": eta})
        assert samplers.adds_noise(diffusers.DDIMScheduler(), {"eta": 0 * eta}) is None


def test_a_loop_that_starts_in_the_middle_without_saying_so():
    """Image-to-image with DDIM, which has no `set_begin_index`: the first step's timestep tells."""
    pipe = Pipeline(diffusers.DDIMScheduler())
    with accel.accelerate(
        pipe, accel.ForecastConfig(cycle=(0, 1), dense_steps_first=2, dense_steps_last=1)
    ) as handle:
        scheduler, model = pipe.scheduler, pipe.transformer
        scheduler.set_timesteps(24)
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for index, t in enumerate(scheduler.timesteps[14:]):
            model_input, model.level = levels(scheduler, x, t, index)
            x = scheduler.step(model(model_input)[0], t, x, return_dict=False)[0]
        assert [int(s.computed > 0) for s in handle.stats.steps] == [1, 1, 0, 1, 0, 1, 0, 1, 0, 1]
        assert scheduler.step.accel_clock.total == 10


@pytest.mark.parametrize(
    ("make", "step"),
    [
        (lambda: diffusers.DDIMScheduler(), {"eta": 0.5}),
        (lambda: diffusers.TCDScheduler(), {}),
        (lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), {}),
        (lambda: diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), {}),
        (lambda: diffusers.EulerAncestralDiscreteScheduler(), {}),
        (lambda: diffusers.DDPMScheduler(prediction_type="sample"), {}),
    ],
    ids=["eta", "default-eta", "sde", "stochastic", "ancestral", "sample"],
)
def test_under_noise_the_picture_is_continued(make, step):
    """By class, settings and arguments of `step`: what the same noise makes of half of the computed steps is nearer to
    plain than half as many steps of the sampler's own, and no noisier."""
    plain, half = (sample(Pipeline(make()), steps, **step)[0] for steps in (STEPS, STEPS // 2))
    pipe = Pipeline(make())
    with accel.accelerate(pipe, "balanced") as handle:
        fast = sample(pipe, STEPS, **step)[0]
    assert handle.stats.computed / handle.stats.total == 0.5
    assert relative(fast, plain) < 0.95 * relative(half, plain)
    assert float(fast.std()) < 1.3 * float(plain.std())


@pytest.mark.parametrize(
    ("make", "step", "config", "message"),
    [
        (diffusers.EulerDiscreteScheduler, {"s_churn": 20.0}, "balanced", "s_churn=20 was given to its step"),
        (diffusers.DDPMScheduler, {}, accel.ForecastConfig(tolerance=0.1), "tolerance=0.1 compares"),
        (
            diffusers.DDPMScheduler,
            {},
            accel.ForecastConfig(schedule=accel.Schedule(guidance_every=2)),
            "guidance_every=2 compares",
        ),
    ],
    ids=["churn", "tolerance", "guidance"],
)
def test_noise_that_cannot_be_followed_is_refused(make, step, config, message):
    pipe = Pipeline(make())
    with accel.accelerate(pipe, config), pytest.raises(UnsupportedError, match=message):
        sample(pipe, STEPS, **step)


@pytest.mark.parametrize("make", [lambda: diffusers.TCDScheduler(), lambda: diffusers.DDIMScheduler()])
def test_without_noise_the_same_classes_are_taken(make):
    pipe = Pipeline(make())
    with accel.accelerate(pipe, "balanced") as handle:
        got, right = sample(pipe, STEPS, eta=0.0)
    assert relative(got, right) < 0.35
    assert handle.stats.share < 0.6


def test_what_noise_does_to_forecasts(monkeypatch):
    """The negative control: with predictions repeated as they are, the pictures of an ancestral sampler drown in
    noise."""
    monkeypatch.setattr(samplers, "ADD_NOISE", frozenset())
    pipe = Pipeline(diffusers.EulerAncestralDiscreteScheduler())
    plain = float(sample(pipe, STEPS)[0].std()) / SPREAD
    with accel.accelerate(pipe, "balanced"):
        forecast = float(sample(pipe, STEPS)[0].std()) / SPREAD
    assert 0.5 < plain < 1.1
    assert forecast > 2


class Own(diffusers.EulerDiscreteScheduler):
    """A scheduler of a user's own: nothing says that it adds noise."""

    noise = 0.05

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        out = super().step(model_output, timestep, sample, return_dict=False)[0]
        if self.noise:
            out = out + self.noise * torch.randn(out.shape, generator=generator)
        return (out,)


@pytest.mark.parametrize("noise", [0.05, 0.0])
def test_a_scheduler_nobody_knows_is_watched(noise):
    pipe = Pipeline(Own())
    pipe.scheduler.noise = noise
    with accel.accelerate(pipe, "balanced"):
        if noise:
            with pytest.raises(UnsupportedError, match="Own drew random numbers in its step"):
                sample(pipe, STEPS)
        else:
            got, right = sample(pipe, STEPS)
            assert relative(got, right) < 0.35


def table() -> str:
    lines = [
        "# Schedulers",
        "",
        f"`balanced` under every scheduler class of diffusers {diffusers.__version__}, {STEPS} steps, on a denoiser whose",
        "right answer is known (independent Gaussian numbers, `tests/core/gaussian.py`): relative error of the plain loop",
        "and of the accelerated one, which computes half of the steps. Made by `python tests/core/test_samplers.py`.",
        "",
        "| scheduler | plain, error | adds noise | `balanced` |",
        "|---|---|---|---|",
    ]
    for name in sorted(classes()):
        if name in NOT_RUN:
            lines.append(f"| {name} | not run | | {NOT_RUN[name]} |")
            continue
        plain, noisy, outcome, distance = facts(classes()[name])
        taken = (
            f"taken, error {outcome:.2f}"
            if isinstance(outcome, float) and not noisy
            else f"taken, {distance:.2f} to plain, where other noise makes {noisy:.2f}"
            if isinstance(outcome, float)
            else "refused: " + outcome.split(". ")[0].split(": ")[0].removeprefix(f"{name} ")
        )
        other = " (another answer is right)" if name in OTHER_ANSWER else ""
        lines.append(f"| {name} | {plain:.2f}{other} | {'yes' if noisy else 'no'} | {taken} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
