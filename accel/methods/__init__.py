"""The methods, by name and by the type of their configuration."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from accel.errors import ConfigError, UnknownNameError

#: Method name -> (module, name of its configuration class). The module's `attach` does the work.
_METHODS = {
    "forecast": ("accel.methods.forecasting", "ForecastConfig"),
    "speculative_decoding": ("accel.methods.speculation", "SpeculativeDecodingConfig"),
    "token_merging": ("accel.methods.merging", "TokenMergingConfig"),
    "token_pruning": ("accel.methods.pruning", "TokenPruningConfig"),
}


def names() -> list[str]:
    return sorted(_METHODS)


def config_class(name: str) -> type:
    """The configuration dataclass of a method.

    Raises:
        UnknownNameError: no such method.
    """
    if name not in _METHODS:
        raise UnknownNameError("method", name, names())
    module, attribute = _METHODS[name]
    return getattr(importlib.import_module(module), attribute)


def of(config: Any) -> tuple[str, ModuleType]:
    """(name, module) of the method that a configuration object belongs to.

    Raises:
        ConfigError: not a configuration object.
    """
    for name, (module, attribute) in _METHODS.items():
        home = type(config).__module__
        if (home == module or home.startswith(f"{module}.")) and type(config).__name__ == attribute:
            return name, importlib.import_module(module)
    known = ", ".join(attribute for _, attribute in _METHODS.values())
    raise ConfigError(
        f"expected a preset name, a YAML path, a mapping or one of {known}; got {type(config).__name__}"
    )
