"""What forecasts missed, made up for at the next step that is computed.

Predictor and corrector as in UniPC (arXiv:2302.04867), across skipped steps: a forecast continues past the last
computed prediction, and once the next one is known, the line between the two says better what the skipped steps
should have been. Samplers that add length x prediction at every step can still be given the difference, all of it
with the prediction of the computed step. On the built-in model at 128 px, 24 steps of which 11 are
computed: 41.4 dB to the plain pictures without, 43.0 dB with it (12 prompts).

Shapes: those of a prediction; one entry per call of a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from accel.kernels.forecast import correct


class Correction:
    """The debt of the steps forecast since the last computed one."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._missed: list[Tensor] = []  # sum of length x (forecast - last computed), float32
        self._moment = 0.0  # sum of length x age
        self._share: Tensor | None = None

    @property
    def due(self) -> bool:
        return bool(self._missed)

    def add(self, forecasts: Sequence[Tensor], latest: Sequence[Tensor], age: float, length: float) -> None:
        """A step of this length is forecast, `age` after the predictions that were computed last."""
        # Differences, not values: where nothing changes, the debt is exactly zero.
        missed = [length * (f.float() - v.float()) for f, v in zip(forecasts, latest, strict=True)]
        self._missed = [a + b for a, b in zip(self._missed, missed, strict=True)] if self._missed else missed
        self._moment += length * age

    def prepare(self, age: float, length: float) -> None:
        """A step of this length is about to be computed, `age` after the last one that was. One of length 0
        (noise levels given that end at 0) moves nothing: the debt is dropped."""
        if length == 0:
            self.forget()
            return
        # On the device: compiled code would be made again for every other number.
        self._missed = [m / length for m in self._missed]
        slope = self._moment / age if age else 0.0  # all at one time: no line to follow
        self._share = torch.full((), slope / length, device=self._missed[0].device)

    def apply(self, call: int, prediction: Tensor, latest: Tensor) -> Tensor:
        """What the sampler gets in place of this call's prediction."""
        assert self._share is not None
        return correct(prediction, latest, self._missed[call], self._share)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(self._missed)
