"""Does the sampler get a fixed mix of the predictions? Only then what forecasts missed can be made up for.

Guidance mixes the branches linearly, u + g (c - u). Pipelines that rescale the result by norms (QwenImage), or
precondition it by the noise level (Cosmos), do not, and nothing in their class says so: it is measured, at the first
computed steps, as the part of the sampler's input that no mix of the predictions explains.

Shapes: n branches, L numbers of an image batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accel.core.readback import Readback

#: Steps that are looked at, and how far a mix may be off: bfloat16 and guidance leave up to 1 %, norms 5 % and more.
_STEPS, _RESIDUAL, _DRIFT = 2, 0.02, 0.05


class Fit:
    """The mix of the first steps, read from the device when it is first asked for."""

    def __init__(self) -> None:
        self._seen: list[Readback | None] = []
        self._judged = False

    def observe(self, outputs: Sequence[Tensor], model_output: Any) -> None:
        """A step's predictions, and what the sampler was given."""
        if len(self._seen) < _STEPS:
            seen = products(outputs, model_output) if isinstance(model_output, Tensor) else None
            self._seen.append(None if seen is None else Readback(seen))

    def wrong(self) -> str | None:
        """Why it is no fixed mix, as a clause; None: it is. Once per run; later None."""
        if self._judged:
            return None
        self._judged = True
        if not self._seen or any(seen is None for seen in self._seen):
            return "how the sampler's input follows from the predictions cannot be told"
        left, weights = zip(*(mix(seen.read()) for seen in self._seen if seen is not None), strict=True)
        if not max(left) <= _RESIDUAL:
            return (
                "the pipeline does not give its sampler a mix of the predictions (rescaled by norms, or preconditioned "
                f"by the noise level): {max(left):.0%} of it is something else"
            )
        if len({len(row) for row in weights}) > 1:
            return "the number of branches of guidance changes"
        first = weights[0]
        drift = max(abs(a - b) for row in weights for a, b in zip(row, first, strict=True))
        if drift > _DRIFT * max(map(abs, first)):
            return "the strength of guidance changes from step to step"
        return None


def products(outputs: Sequence[Tensor], model_output: Tensor) -> Tensor | None:
    """(n + 1, n + 1) float32 inner products of the branches and, last, the sampler's input; made on the device without
    waiting for it. None: shapes that do not go together."""
    branches = [part for output in outputs for part in _branches(output, model_output)]
    if not branches:
        return None
    x_nL = torch.stack([part.flatten().float() for part in (*branches, model_output)])
    return x_nL @ x_nL.T


def mix(product_nn: Tensor) -> tuple[float, list[float]]:
    """(relative size of what no mix of the branches explains, the weights of the best one), by least squares."""
    gram = product_nn.double().numpy()
    branches, given = gram[:-1, :-1], gram[:-1, -1]
    if not np.isfinite(gram).all():
        return math.inf, []
    weights = np.linalg.pinv(branches, rcond=1e-6, hermitian=True) @ given
    left = gram[-1, -1] - 2 * weights @ given + weights @ branches @ weights
    return math.sqrt(max(left, 0.0) / max(gram[-1, -1], 1e-30)), weights.tolist()


def _branches(output: Tensor, model_output: Tensor) -> list[Tensor]:
    """The parts of a prediction that are like the sampler's input: images of a batch, without channels (a learned
    variance) or tokens (of reference images) that come after, or a dimension for the one frame (Z-Image)."""
    if output.ndim == model_output.ndim + 1 and output.shape[2] == 1:
        output = output.squeeze(2)
    if output.ndim != model_output.ndim or output.shape[0] % model_output.shape[0]:
        return []
    for dim in range(1, output.ndim):
        if output.shape[dim] < model_output.shape[dim]:
            return []
        output = output.narrow(dim, 0, model_output.shape[dim])
    return list(output.split(model_output.shape[0]))
