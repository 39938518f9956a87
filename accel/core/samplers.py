"""What forecasts ask of a scheduler: one call of the model at each time, times that go one way, and to be told of noise.

A forecast repeats the prediction made for older noise. A sampler that adds noise at a step makes another picture of
it than the one that prediction was about: what is repeated is then noise (measured on the built-in model, `balanced`
under an ancestral sampler: 48.5 dB to the plain picture become 16.6, and the subject is gone). Where it is known how a
step makes a picture of sample and prediction (`noise_levels.picture_shares`), that picture is continued instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, SupportsFloat

import torch
from torch import Tensor

OTHER = "Use a first-order or multistep scheduler without noise (Euler, DDIM, DPM-Solver++ 2M, UniPC)."

#: Schedulers whose `step` draws noise, or tokens, whatever it is told; `tests/core/test_samplers.py` finds them by
#: results where they run.
ADD_NOISE = frozenset(
    {
        "AmusedScheduler",
        "BlockRefinementScheduler",
        "CosineDPMSolverMultistepScheduler",
        "DiscreteDDIMScheduler",
        "EntropyBoundScheduler",
        "VQDiffusionScheduler",
        "CMStochasticIterativeScheduler",
        "CogVideoXDPMScheduler",
        "DDPMParallelScheduler",
        "DDPMScheduler",
        "DDPMWuerstchenScheduler",
        "DPMSolverSDEScheduler",
        "EulerAncestralDiscreteScheduler",
        "FlowMatchLCMScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KarrasVeScheduler",
        "LCMScheduler",
        "LTXEulerAncestralRFScheduler",
        "RePaintScheduler",
        "SASolverScheduler",
        "SCMScheduler",
        "ScoreSdeVeScheduler",
        "UnCLIPScheduler",
    }
)
#: Settings of a scheduler, and arguments of its `step`, that make it add noise.
_SETTINGS = {"stochastic_sampling": bool, "algorithm_type": lambda value: str(value).startswith("sde-")}
_ARGUMENTS = ("eta", "s_churn")


def adds_noise(scheduler: Any, arguments: Mapping[str, Any] | None = None) -> str | None:
    """Why a scheduler adds noise, as a clause for messages; None: as far as is known it does not.

    Args:
        arguments: those of `step`, by name, with defaults; None: not known yet.
    """
    name = known_name(scheduler)
    if name in ADD_NOISE:
        return "adds noise at every step"
    for setting, noisy in _SETTINGS.items():
        value = scheduler.config.get(setting)
        if value is not None and noisy(value):
            return f"adds noise ({setting}={value!r})"
    for argument in _ARGUMENTS:
        value = (arguments or {}).get(argument)
        if isinstance(value, SupportsFloat) and float(value) > 0:
            return f"adds noise ({argument}={float(value):g} was given to its step)"
    return None


def steps_from_its_sample(scheduler: Any, reason: str) -> bool:
    """Whether a step that adds noise, for the reason that `adds_noise` gives, starts at the sample it is given: Karras'
    churn raises that one's noise first, and a scheduler nobody knows may do anything."""
    return is_known(scheduler) and "s_churn" not in reason


def noise_message(scheduler: Any, reason: str) -> str:
    """Why it cannot be forecast, and what to do; `reason` as `adds_noise` gives it."""
    return (
        f"{type(scheduler).__name__} {reason}: a forecast repeats the prediction made for older noise, and the picture "
        f"turns into noise. {OTHER} Or merge tokens: the presets few-step and merging."
    )


#: Their `timesteps` hold the one at which the picture is there.
ENDS_WITH_A_TIMESTEP = {"DDPMWuerstchenScheduler", "SCMScheduler"}


def known_name(scheduler: Any) -> str:
    """The class's name, or for a subclass of the user's that of the diffusers class it derives from."""
    classes = [cls for cls in type(scheduler).__mro__ if cls.__module__.startswith("diffusers.")]
    return (classes or [type(scheduler)])[0].__name__


def is_known(scheduler: Any) -> bool:
    """Whether its class is one of diffusers': whether it adds noise is then known from its settings."""
    return type(scheduler).__module__.startswith("diffusers.")


class Dice:
    """Whether random numbers are drawn between two moments, from the generators a step would take them from."""

    def __init__(self, generator: Any, device: torch.device) -> None:
        given = generator if isinstance(generator, (list, tuple)) else [generator]
        self._generators = [g for g in given if g is not None] or [_default(device)]
        self._before = self._states()

    def _states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._generators if generator is not None]

    @property
    def fell(self) -> bool:
        return any(not torch.equal(a, b) for a, b in zip(self._before, self._states(), strict=True))


def _default(device: torch.device) -> torch.Generator | None:
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator if device.type == "cpu" else None


def unsteady(scheduler: Any, times: Sequence[float], timesteps: Sequence[float]) -> str | None:
    """Why there is no slope to forecast along, as a clause for messages; None: there is.

    Second-order schedulers (Heun, KDPM2, ...), times that repeat (PNDM, ...) or go back.
    """
    # Not timesteps: many steps close to the end round to the same one, at noise levels of their own.
    rises = [(b > a) - (b < a) for a, b in pairwise(times)]
    order = getattr(scheduler, "order", 1)
    if order > 1:
        return (
            f"calls the model {order} times for every step (like Heun and KDPM2): at the same timestep as "
            "another call, or at one in between"
        )
    if all(rise == 1 for rise in rises) or all(rise == -1 for rise in rises):  # -1: inversion
        return None
    if hasattr(scheduler, "prk_timesteps"):
        return "calls the model more than once at the same timestep in its first steps (PNDM)"
    if 0 in rises:
        step = rises.index(0)
        return (
            f"repeats a time: steps {step} and {step + 1} are at the same noise level (timesteps "
            f"{timesteps[step]:g} and {timesteps[step + 1]:g}). Give it timesteps or sigmas that differ from step to "
            "step"
        )
    return "goes back and forth between noise levels"
