"""The methods: one folder each, and the table that maps a configuration class to its method."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from accel.errors import ConfigError, UnknownNameError

from .chunking.config import DynamicChunkingConfig
from .forecasting.config import ForecastConfig
from .merging.config import TokenMergingConfig
from .pruning.config import TokenPruningConfig
from .speculation.config import SpeculativeDecodingConfig

if TYPE_CHECKING:
    from accel.core.method import Method


def _chunking() -> type[Method]:
    from .chunking.engine import DynamicChunking

    return DynamicChunking


def _forecasting() -> type[Method]:
    from .forecasting.engine import Forecasting

    return Forecasting


def _merging() -> type[Method]:
    from .merging.engine import TokenMerging

    return TokenMerging


def _pruning() -> type[Method]:
    from .pruning.engine import TokenPruning

    return TokenPruning


def _speculation() -> type[Method]:
    from .speculation.engine import SpeculativeDecoding

    return SpeculativeDecoding


#: Configuration class -> (the method's name in presets, what imports its class). Configurations cost nothing to
#: import; engines bring torch.
TABLE: dict[type, tuple[str, Callable[[], type[Method]]]] = {
    DynamicChunkingConfig: ("dynamic_chunking", _chunking),
    ForecastConfig: ("forecast", _forecasting),
    SpeculativeDecodingConfig: ("speculative_decoding", _speculation),
    TokenMergingConfig: ("token_merging", _merging),
    TokenPruningConfig: ("token_pruning", _pruning),
}


def register(config: type, name: str, load: Callable[[], type[Method]]) -> None:
    """Make a method known, for the process: configurations of this class are `load()`'s."""
    TABLE[config] = (name, load)


def names() -> list[str]:
    return sorted(name for name, _ in TABLE.values())


def config_class(name: str) -> type:
    """The configuration dataclass of a method.

    Raises:
        UnknownNameError: no such method.
    """
    for config, (known, _) in TABLE.items():
        if known == name:
            return config
    raise UnknownNameError("method", name, names())


def name_of(config: Any) -> str:
    """The name of the method that a configuration belongs to, by its class or a base class.

    Raises:
        ConfigError: not a configuration.
    """
    return _entry(config)[0]


def of(config: Any) -> type[Method]:
    """The method that a configuration belongs to; as `name_of`."""
    return _entry(config)[1]()


def _entry(config: Any) -> tuple[str, Callable[[], type[Method]]]:
    for cls in type(config).__mro__:
        if cls in TABLE:
            return TABLE[cls]
    known = ", ".join(cls.__name__ for cls in TABLE)
    raise ConfigError(
        f"expected a preset name, a YAML path, a mapping or one of {known}; got {type(config).__name__}"
    )
