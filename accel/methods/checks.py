"""Validation shared by the configuration dataclasses of all methods."""

from __future__ import annotations

from accel.errors import ConfigError


def check(valid: bool, name: str, allowed: str, value: object) -> None:
    """Raise a `ConfigError` that names the setting, its valid range and the value."""
    if not valid:
        raise ConfigError(f"{name} must be {allowed}, got {value!r}")


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_share(value: object) -> bool:
    return is_number(value) and 0 < value < 1  # type: ignore[operator]


def is_wholes(value: object) -> bool:
    return isinstance(value, tuple) and all(is_whole(v) and v >= 0 for v in value)
