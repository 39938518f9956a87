"""A denoiser's prediction: read from whatever its calls return, and put back into the same form.

Denoisers of diffusers return an output class with `sample` (priors: `predicted_image_embedding`), a tuple, a bare tensor (Kandinsky 5), or a list of one
tensor per image inside of either (Z-Image).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accel.errors import UnsupportedError

_FIELDS = ("sample", "predicted_image_embedding")


def prediction_of(output: Any) -> Tensor:
    """The prediction as one tensor; a list of one per image is stacked.

    Raises:
        UnsupportedError: there is none, or the images of a list differ in shape.
    """
    return _tensor(_inner(output), output)


def _inner(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple):
        return output[0]
    field = _field(output)
    return output if field is None else getattr(output, field)


def _field(output: Any) -> str | None:
    """Where an output of a class of its own has its prediction."""
    return next((name for name in _FIELDS if hasattr(output, name)), None)


def _tensor(inner: Any, output: Any) -> Tensor:
    if isinstance(inner, Tensor):
        return inner
    if isinstance(inner, (list, tuple)) and inner and all(isinstance(one, Tensor) for one in inner):
        if len({one.shape for one in inner}) == 1:
            return torch.stack(list(inner))
        raise UnsupportedError("the images of one call differ in size: run them one by one")
    raise UnsupportedError(
        f"no prediction can be told in what the denoiser returned ({type(output).__name__})"
    )


def put(output: Any, prediction: Tensor) -> Any:
    """The output of a call with another prediction in it, and whatever else it holds."""
    inner = _inner(output)
    value = list(prediction.unbind(0)) if isinstance(inner, (list, tuple)) else prediction
    if isinstance(output, Tensor):
        return value
    if isinstance(output, tuple):
        return (value, *output[1:])
    return type(output)(**{**vars(output), str(_field(output)): value})


def like(output: Any) -> Callable[[Tensor], Any]:
    """What puts a prediction into the form of `output`, keeping nothing of its tensors alive."""
    cls: Any = type(output)
    field = "" if isinstance(output, (Tensor, tuple)) else str(_field(output))
    split = isinstance(_inner(output), (list, tuple))

    def form(prediction: Tensor) -> Any:
        value = list(prediction.unbind(0)) if split else prediction
        if issubclass(cls, Tensor):
            return value
        return (value,) if issubclass(cls, tuple) else cls(**{field: value})

    return form


def shapes_of(args: tuple, kwargs: dict[str, Any]) -> tuple:
    """Shapes of the tensors of a call, also of those in lists: what tells one kind of call from another."""
    return tuple(tensor.shape for tensor in tensors_of((*args, *kwargs.values())))


def tensors_of(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_of(value)
        elif isinstance(value, dict):
            found += tensors_of(value.values())
    return found
