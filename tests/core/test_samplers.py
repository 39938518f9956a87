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
    """(error of plain, whether it adds noise, error of `balanced` or why it is refused, distance of the two)."""
    plain, right = sample(Pipeline(make()), STEPS)
    noisy = not torch.equal(plain, sample(Pipeline(make()), STEPS, noise_seed=2)[0])
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
        assert ("adds noise" in outcome) == (noisy and not second_order)
        return
    assert not noisy
    assert not second_order
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
    ("make", "step", "message"),
    [
        (lambda: diffusers.DDIMScheduler(), {"eta": 0.5}, r"eta=0\.5 was given to its step"),
        (lambda: diffusers.EulerDiscreteScheduler(), {"s_churn": 20.0}, "s_churn=20 was given to its step"),
        (lambda: diffusers.TCDScheduler(), {}, r"eta=0\.3 was given"),
        (
            lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
            {},
            "algorithm_type='sde-dpmsolver",
        ),
        (
            lambda: diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
            {},
            "stochastic_sampling=True",
        ),
        (lambda: diffusers.EulerAncestralDiscreteScheduler(), {}, "adds noise at every step"),
    ],
    ids=["eta", "s_churn", "default-eta", "sde", "stochastic", "ancestral"],
)
def test_noise_is_refused_by_class_settings_and_arguments(make, step, message):
    a, b = (sample(Pipeline(make()), STEPS, noise_seed=n, **step)[0] for n in (1, 2))
    assert not torch.equal(a, b)
    pipe = Pipeline(make())
    with accel.accelerate(pipe, "balanced"), pytest.raises(UnsupportedError, match=message):
        sample(pipe, STEPS, **step)


@pytest.mark.parametrize("make", [lambda: diffusers.TCDScheduler(), lambda: diffusers.DDIMScheduler()])
def test_without_noise_the_same_classes_are_taken(make):
    pipe = Pipeline(make())
    with accel.accelerate(pipe, "balanced") as handle:
        got, right = sample(pipe, STEPS, eta=0.0)
    assert relative(got, right) < 0.35
    assert handle.stats.share < 0.6


def test_what_noise_does_to_forecasts(monkeypatch):
    """The negative control: taken all the same, the pictures of an ancestral sampler drown in noise."""
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
        plain, noisy, outcome, _ = facts(classes()[name])
        taken = (
            f"taken, error {outcome:.2f}"
            if isinstance(outcome, float)
            else "refused: " + outcome.split(". ")[0].split(": ")[0].removeprefix(f"{name} ")
        )
        other = " (another answer is right)" if name in OTHER_ANSWER else ""
        lines.append(f"| {name} | {plain:.2f}{other} | {'yes' if noisy else 'no'} | {taken} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
