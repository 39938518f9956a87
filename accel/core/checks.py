"""Validation shared by the configuration dataclasses of all methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields

from accel.errors import ConfigError


def check(valid: bool, name: str, allowed: str, value: object) -> None:
    """Raise a `ConfigError` that names the setting, its valid range and the value."""
    if not valid:
        raise ConfigError(f"{name} must be {allowed}, got {value!r}")


def check_used(config: object, names: Sequence[str], used: bool, why: str) -> None:
    """Refuse settings that are not what they are by default, and have no effect for the reason given."""
    defaults = {f.name: f.default for f in fields(config)}  # type: ignore[arg-type]
    for name in names:
        value = getattr(config, name)
        if not used and value != defaults[name]:
            raise ConfigError(f"{name}={value!r} has no effect: {why}. Leave {name} out, or change that")


def is_number(value: object) -> bool:
    """A finite one: no setting has a use for infinity, and a nan passes no comparison in either direction."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_share(value: object) -> bool:
    return is_number(value) and 0 < value < 1  # type: ignore[operator]


def is_wholes(value: object) -> bool:
    return isinstance(value, tuple) and all(is_whole(v) and v >= 0 for v in value)
