"""Solvers on given points of the plain pipeline's schedule: what its steps could do if only those were computed.

`accel bench peers` compares with them because a forecast is a solver, too: the same calls of the model, used by Euler,
DPM-Solver++ (2M, arXiv:2211.01095) or UniPC (arXiv:2302.04867), the latter two as diffusers has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from accel.errors import UnsupportedError
from accel.evaluation.configurations import Configuration

_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 2}
_SHIFTS = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
#: At pure noise the signal's share is 0 and its logarithm minus infinity.
_MOST = 1 - 1e-4


class _Points:
    """Mixed into a scheduler: the noise levels of the plain one, at some of its steps only."""

    plain: FlowMatchEulerDiscreteScheduler
    points: tuple[int, ...]

    def set_timesteps(
        self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, mu: Any = None
    ) -> None:
        if sigmas is None:  # pipelines leave them to what calls itself flow matching, and mean these
            sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        self.plain.set_timesteps(sigmas=sigmas, device=device, mu=mu)
        points, here = list(self.points), cast(Any, self)
        if isinstance(self, FlowMatchEulerDiscreteScheduler):
            FlowMatchEulerDiscreteScheduler.set_timesteps(self, sigmas=sigmas, device=device, mu=mu)
            levels = self.plain.sigmas
        else:
            super().set_timesteps(len(points))  # type: ignore[misc]
            levels = self.plain.sigmas.clamp(max=_MOST).cpu()
        here.timesteps = self.plain.timesteps[points]
        here.sigmas = torch.cat([levels[points], levels.new_zeros(1)])
        here.num_inference_steps = len(points)


class _Euler(_Points, FlowMatchEulerDiscreteScheduler):
    pass


class _DPM(_Points, DPMSolverMultistepScheduler):
    pass


class _UniPC(_Points, UniPCMultistepScheduler):
    pass


_RULES: dict[str, Any] = {"euler": _Euler, "dpm++2m": _DPM, "unipc": _UniPC}


@dataclass(frozen=True)
class Solver(Configuration):
    """A solver (`euler`, `dpm++2m`, `unipc`) on some of the plain pipeline's steps."""

    rule: str = "euler"
    points: tuple[int, ...] = ()

    @property
    def is_plain(self) -> bool:
        return False

    def describe(self) -> dict[str, Any]:
        return {"method": {"type": f"solver {self.rule}", "points": self.points}, "steps": None}

    @contextmanager
    def attach(self, pipe: Any) -> Iterator[None]:
        plain = pipe.scheduler
        if not isinstance(plain, FlowMatchEulerDiscreteScheduler):
            raise UnsupportedError(
                f"solvers on given points are for flow matching, not {type(plain).__name__}"
            )
        cls = _RULES[self.rule]
        scheduler = cls.from_config(plain.config) if self.rule == "euler" else cls(**_FLOW)
        shifts = {key: value for key, value in plain.config.items() if key in _SHIFTS}
        scheduler.register_to_config(**shifts)  # from which the pipeline works out mu
        scheduler.plain, scheduler.points = (
            FlowMatchEulerDiscreteScheduler.from_config(plain.config),
            self.points,
        )
        pipe.scheduler = scheduler
        try:
            yield
        finally:
            pipe.scheduler = plain
