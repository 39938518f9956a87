"""Does the sampler get a fixed mix of the predictions? Only then what forecasts missed can be made up for.

Guidance mixes the branches linearly, u + g (c - u). Pipelines that rescale the result by norms (QwenImage), or
precondition it by the noise level (Cosmos), do not, and nothing in their class says so: it is measured, at the first
computed steps, as the part of the sampler's input that no mix of the predictions explains.

Shapes: n branches, L numbers of an image batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from accel.core.readback import Readback

#: Steps that are looked at, and how far a mix may be off: bfloat16 and guidance leave up to 1 %, norms 5 % and more.
_STEPS, _RESIDUAL, _DRIFT = 2, 0.02, 0.05


class Fit:
    """The mix of the first steps, read from the device when it is first asked for."""

    def __init__(self) -> None:
        self._found: list[Readback | None] = []
        self._judged = False

    def observe(self, outputs: Sequence[Tensor], model_output: Any) -> None:
        """A step's predictions, and what the sampler was given."""
        if len(self._found) < _STEPS:
            fit = mix(outputs, model_output) if isinstance(model_output, Tensor) else None
            self._found.append(None if fit is None else Readback(fit))

    def wrong(self) -> str | None:
        """Why it is no fixed mix, as a clause; None: it is. Once per run; later None."""
        if self._judged:
            return None
        self._judged = True
        if not self._found or any(found is None for found in self._found):
            return "how the sampler's input follows from the predictions cannot be told"
        rows = [found.read().tolist() for found in self._found if found is not None]
        if not all(row[0] <= _RESIDUAL for row in rows):
            return (
                "the pipeline does not give its sampler a mix of the predictions (rescaled by norms, or preconditioned "
                f"by the noise level): {max(row[0] for row in rows):.0%} of it is something else"
            )
        size = max(abs(weight) for weight in rows[0][1:])
        drift = max(abs(a - b) for row in rows for a, b in zip(row[1:], rows[0][1:], strict=True))
        if drift > _DRIFT * size:
            return "the strength of guidance changes from step to step"
        return None


def mix(outputs: Sequence[Tensor], model_output: Tensor) -> Tensor | None:
    """(1 + n,) float32: relative size of what is left over, and the weights of the branches; by least squares, on
    the device. None: shapes that do not go together."""
    branches = [part for output in outputs for part in _branches(output, model_output)]
    if not branches:
        return None
    m_L = model_output.flatten().float()
    b_nL = torch.stack([branch.flatten().float() for branch in branches])
    weight_n = torch.linalg.pinv(b_nL @ b_nL.T, hermitian=True) @ (b_nL @ m_L)
    left = (m_L - weight_n @ b_nL).norm() / m_L.norm().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.cat([left[None], weight_n])


def _branches(output: Tensor, model_output: Tensor) -> list[Tensor]:
    """The parts of a prediction that are like the sampler's input: images of a batch, without channels (a learned
    variance) or tokens (of reference images) that come after."""
    if output.ndim != model_output.ndim or output.shape[0] % model_output.shape[0]:
        return []
    for dim in range(1, output.ndim):
        if output.shape[dim] < model_output.shape[dim]:
            return []
        output = output.narrow(dim, 0, model_output.shape[dim])
    return list(output.split(model_output.shape[0]))
