"""What a tuned preset was measured on, and the check that it is used on the same.

The side-car of a preset (JSON beside the YAML; `accel tune` writes both) names the model, the scheduler and the size.
A mask of another model is no better than a guess; one of another size is, as far as was measured, by the index of the
step, but its distances to the plain pictures are not known.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accel.errors import AccelWarning, ConfigError, UnsupportedError
from accel.strict import StrictError, parse_json, read_text

from .target import Target

VERSION = 1
_SAMPLE = 16  # numbers of every parameter that are looked at
_MAX_BYTES = 64 << 20


def describe(denoiser: nn.Module, scheduler: Any) -> dict[str, Any]:
    """Of a pipeline: what a side-car holds it against.

    Weights are told by the signs of a few numbers of each parameter, which do not depend on the precision they are
    loaded in; None where they are not there to be read (offloaded layer by layer).
    """
    layout, signs = hashlib.sha256(), []
    for name, parameter in denoiser.named_parameters():
        layout.update(f"{name} {tuple(parameter.shape)}\n".encode())
        signs.append(parameter.detach().flatten()[:_SAMPLE] > 0)
    there = bool(signs) and not any(part.is_meta for part in signs)
    weights = hashlib.sha256(torch.cat([part.cpu() for part in signs]).numpy().tobytes()) if there else None
    settings = {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}
    return {
        "model": {
            "class": type(denoiser).__name__,
            "layout": layout.hexdigest()[:16],
            "weights": None if weights is None else weights.hexdigest()[:16],
        },
        "scheduler": {
            "class": type(scheduler).__name__,
            **json.loads(json.dumps(settings, default=str, sort_keys=True)),
        },
    }


def difference(known: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """What differs between two descriptions, as a clause; None: nothing."""
    a, b = known["model"], found["model"]
    if a["class"] != b["class"]:
        return f"the model is {a['class']} there, {b['class']} here"
    if a["layout"] != b["layout"]:
        return f"the {b['class']} has other layers or sizes (or a LoRA in one of the two)"
    if None not in (a["weights"], b["weights"]) and a["weights"] != b["weights"]:
        return f"the {b['class']} has other weights"
    a, b = known["scheduler"], found["scheduler"]
    if a["class"] != b["class"]:
        return f"the scheduler is {a['class']} there, {b['class']} here"
    for key in sorted({*a, *b}):
        if a.get(key) != b.get(key):
            return f"the scheduler's {key} is {a.get(key)!r} there, {b.get(key)!r} here"
    return None


class MadeFor:
    """A side-car, read and checked.

    Raises:
        ConfigError: the file cannot be read, or is not one of `accel tune`'s of this version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            content = parse_json(read_text(self.path, _MAX_BYTES))
        except OSError as error:
            raise ConfigError(
                f"made_for: {path} cannot be read ({error.strerror}): it goes beside its preset"
            ) from error
        except StrictError as error:
            raise ConfigError(f"made_for: {path} is damaged: {error}; run accel tune again") from error
        version = content.get("version") if isinstance(content, Mapping) else None
        if version != VERSION:
            raise ConfigError(
                f"made_for: {path} is no side-car of this version of accel tune ({version!r}, not {VERSION}): "
                "run accel tune again"
            )
        try:
            self.described = {"model": {**content["model"]}, "scheduler": {**content["scheduler"]}}
            _ = [self.described["model"][key] for key in ("class", "layout", "weights")]
            self.shape = [int(side) for side in content["prediction"]]
            self.size = str(content["call"].get("size") or "the pipeline's own size")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"made_for: {path} is damaged: no {error}; run accel tune again") from error

    @classmethod
    def of(cls, path: str | None, target: Target) -> MadeFor | None:
        """Read and checked; None: there is none."""
        found = None if path is None else cls(path)
        if found is not None:
            found.check(target.denoiser, target.scheduler)
        return found

    def check(self, denoiser: nn.Module, scheduler: Any) -> None:
        """
        Raises:
            UnsupportedError: the preset was made for another model or scheduler; what differs.
        """
        if reason := difference(self.described, describe(denoiser, scheduler)):
            raise UnsupportedError(
                f"the preset was made for another pipeline ({self.path}): {reason}. Run accel tune on this one, or leave "
                "made_for out of the preset to use its steps all the same"
            )

    def check_size(self, given: Any) -> None:
        """Warn if what the sampler is given has another shape (of one image) than what was measured on."""
        shape = list(given.shape[1:]) if isinstance(given, Tensor) else self.shape
        if shape != self.shape:
            warnings.warn(
                f"the preset was made at {self.size} ({self.path}: predictions of {self.shape}, here {shape}): its steps "
                "carry over by their number, the distances it promises do not. Tune at this size to know them.",
                AccelWarning,
                stacklevel=2,
            )
