"""Presets: configuration dataclasses as small YAML files, next to this module.

method: token_merging     # which configuration class
ratio: 0.5                # its fields
schedule:                 # and those of a class within
  refresh_every: 1
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from accel import methods
from accel.core.checks import check_keys
from accel.core.schedule import Schedule
from accel.errors import ConfigError, UnknownNameError
from accel.strict import MAX_BYTES, StrictError, parse_yaml, read_text

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Names of the presets."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load(source: str | PathLike | Mapping[str, Any]) -> Any:
    """A configuration from a preset name, the path of a YAML file, or a mapping.

    Raises:
        UnknownNameError: unknown preset, method or key; the message lists the valid ones.
        ConfigError: the file is missing or not YAML, has a key twice, an alias or too deep a nesting, or a value
            is out of range; the message names the file, and the line where it can.
    """
    if isinstance(source, Mapping):
        return _from_mapping(source, "mapping")
    path = Path(source)
    if isinstance(source, str) and path.suffix not in (".yaml", ".yml"):
        if source not in names():
            raise UnknownNameError("preset", source, names(), "A path to a YAML file works too.")
        path = _FOLDER / f"{source}.yaml"
    try:
        content = parse_yaml(read_text(path, MAX_BYTES))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except StrictError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path}: expected `method: ...` and its settings, got {type(content).__name__}")
    if isinstance(
        side_car := content.get("made_for"), str
    ):  # beside the preset, wherever that is loaded from
        content = {**content, "made_for": str(path.parent / side_car)}
    return _from_mapping(content, str(path))


def _from_mapping(content: Mapping[str, Any], where: str) -> Any:
    settings = dict(content)
    method = settings.pop("method", None)
    if method is None:
        raise ConfigError(f"{where}: `method` is missing; one of {', '.join(methods.names())}")
    cls = methods.config_class(str(method))
    try:
        check_keys(cls, settings)
        return cls(**settings)
    except UnknownNameError as error:
        raise UnknownNameError(f"{error.kind} in {where}:", error.name, error.known, error.hint) from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except TypeError as error:  # a list or a mapping where a number or a word belongs
        raise ConfigError(f"{where}: a value is of the wrong kind ({error})") from error


def change(config: Any, settings: Mapping[str, Any]) -> Any:
    """A configuration with other values of some of its settings, those of a class within as `schedule.dense_last`. All
    take effect at once: their order says nothing.

    Raises:
        UnknownNameError: no such setting.
        ConfigError: a value is out of range, belongs into a class within, or is given twice.
    """
    changes: dict[str, Any] = {}
    within: dict[str, dict[str, Any]] = {}
    short = getattr(type(config), "SHORT", {})
    for key, value in settings.items():
        name, _, inner = (f"schedule.{short[key]}" if key in short else key).partition(".")
        into, part = (within.setdefault(name, {}), inner) if inner else (changes, name)
        if part in into:
            raise ConfigError(f"{name}.{inner} is given twice, once as {key}")
        into[part] = value
    for name, values in within.items():
        before: Any = getattr(config, name, None)
        if name in changes:
            raise ConfigError(
                f"{name} is given as a whole and {name}.{next(iter(values))} beside it: put that into it"
            )
        if not is_dataclass(before):
            check_keys(type(config), [f"{name}.{next(iter(values))}"])
        check_keys(type(before), values)
        changes[name] = (
            before.changed(**values) if isinstance(before, Schedule) else replace(before, **values)
        )
    check_keys(type(config), changes)
    return replace(config, **changes)
