"""Validation shared by the configuration dataclasses of all methods."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from accel.errors import ConfigError, UnknownNameError

_Class = TypeVar("_Class", bound=type)


def settings(cls: _Class) -> _Class:
    """Above `dataclass`: what its `__init__` is given is known by name, lists are tuples (YAML has no others), and a
    mapping is the nested class that stands there by default. `SHORT` names fields of the one in `schedule`. What is as by
    default is not in the `repr`."""
    made, names = cls.__init__, [f.name for f in fields(cls) if not f.kw_only]  # type: ignore[misc]
    groups, short = _groups(cls), getattr(cls, "SHORT", {})

    @functools.wraps(made)
    def __init__(self: Any, *args: Any, **given: Any) -> None:
        if len(args) > len(names) or not given.keys().isdisjoint(names[: len(args)]):
            raise TypeError(f"{cls.__name__} takes its settings by name, each once")
        given.update(zip(names, args, strict=False))
        check_keys(cls, given)
        brief = {inner: given.pop(name) for name, inner in short.items() if name in given}
        if brief and "schedule" in given:
            raise ConfigError(
                f"{cls.__name__} has a schedule, and beside it {', '.join(brief)} which belongs there: give "
                f"schedule=Schedule({', '.join(f'{name}=...' for name in brief)}, ...) alone (of a configuration that "
                "is there, dataclasses.replace(config.schedule, ...))"
            )
        if brief:
            given["schedule"] = brief
        for name, value in given.items():
            if name in groups and isinstance(value, Mapping):
                check_keys(groups[name], value)
                given[name] = groups[name](**value)
            elif name in groups and not isinstance(value, groups[name]):
                check(False, name, f"a {groups[name].__name__}", value)
            elif isinstance(value, list):
                given[name] = tuple(value)
        made(self, **given)

    def __repr__(self: Any) -> str:
        values = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in values)})"

    setattr(cls, "__init__", __init__)  # noqa: B010  (mypy takes an assignment for a mistake)
    setattr(cls, "__repr__", __repr__)  # noqa: B010
    return cls


def _groups(cls: type) -> dict[str, type]:
    """The nested classes by the field they stand in."""
    found = {f.name: type(f.default) for f in fields(cls)}
    return {name: inner for name, inner in found.items() if is_dataclass(inner)}


def check_keys(cls: type, given: Iterable[object]) -> None:
    """
    Raises:
        ConfigError: a key belongs into a nested class.
        UnknownNameError: no such key; the nearest, there or here.
    """
    names = [*(f.name for f in fields(cls)), *getattr(cls, "SHORT", {})]
    inside = {
        key.name: (name, inner.__name__)
        for name, inner in _groups(cls).items()
        for key in fields(inner)
        if name != "schedule" or key.name in cls.TAKES  # type: ignore[attr-defined]
    }
    for key in map(str, given):
        if key in names:
            continue
        if key in inside:
            name, inner = inside[key]
            raise ConfigError(
                f"{cls.__name__} has no {key} of its own: write {name}={inner}({key}=...), in a file {name}: {{{key}: ...}}, "
                f"after -c {name}.{key}=..."
            )
        near = difflib.get_close_matches(key, inside, n=1)
        hint = f"Within it there is {inside[near[0]][0]}.{near[0]}." if near else ""
        raise UnknownNameError(f"setting of {cls.__name__}", key, names, hint)


def check(valid: bool, name: str, allowed: str, value: object) -> None:
    """Raise a `ConfigError` that names the setting, its valid range and the value."""
    if not valid:
        raise ConfigError(f"{name} must be {allowed}, got {value!r}")


def check_choice(config: object, name: str, choices: tuple[object, ...], path: str = "") -> None:
    value = getattr(config, name)
    check(value in choices, path + name, f"one of {', '.join(map(str, choices))}", value)


def check_used(config: object, names: Sequence[str], used: bool, why: str, path: str = "") -> None:
    """Refuse settings that are not what they are by default, and have no effect for the reason given.

    Args:
        path: of the configuration, in front of a name, such as "schedule.".
    """
    defaults = {f.name: f.default for f in fields(config)}  # type: ignore[arg-type]
    for name in names:
        value = getattr(config, name)
        if not used and value != defaults[name]:
            raise ConfigError(
                f"{path}{name}={value!r} has no effect: {why}. Leave {name} out, or change that"
            )


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
