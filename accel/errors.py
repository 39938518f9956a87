"""The exceptions of accel. Catch `AccelError` to catch them all.

    AccelError
    ├── ConfigError (ValueError)         a setting is out of range; the message gives the valid range
    │   └── UnknownNameError             a name is not known; the message gives the nearest and all valid ones
    ├── UnsupportedError (ValueError)    the model, pipeline or call cannot be accelerated that way
    ├── AlreadyAcceleratedError (ValueError)   the same method is attached to the same model
    ├── NumericsError (ArithmeticError)  a model computed NaN; the message says where
    └── WeightsError (ValueError)        a weight file is missing or corrupt; the message names the file

`AccelWarning` is the category of every warning: a setting that has no effect, a run that will not be faster.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AccelError(Exception):
    """Root of all errors raised by accel."""


class ConfigError(AccelError, ValueError):
    """A setting is outside its valid range or contradicts another one."""


class UnknownNameError(ConfigError):
    """A name (preset, method, key, model class) is not known."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        self.kind, self.name, self.known, self.hint = kind, name, sorted(known), hint
        nearest = difflib.get_close_matches(name, self.known, n=2, cutoff=0.5)
        message = f"unknown {kind} {name!r}."
        if nearest:
            message += f" Did you mean {' or '.join(map(repr, nearest))}?"
        message += f" Known: {', '.join(self.known) or 'none'}."
        super().__init__(f"{message} {hint}".rstrip())

    def __reduce__(self) -> tuple[type, tuple[str, str, list[str], str]]:  # from a worker process
        return type(self), (self.kind, self.name, self.known, self.hint)


class UnsupportedError(AccelError, ValueError):
    """This model, pipeline or call cannot be accelerated in the requested way."""


class AlreadyAcceleratedError(AccelError, ValueError):
    """The method is already attached to this model."""


class NumericsError(AccelError, ArithmeticError):
    """A model computed something that is not a number."""


class WeightsError(AccelError, ValueError):
    """A weight file is missing, corrupt or of a refused format."""


class AccelWarning(UserWarning):
    """Something the user asked for has no effect or costs what it should save."""
