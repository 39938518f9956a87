"""Faster image generation without retraining.

    import accel
    handle = accel.accelerate(pipe, accel.TokenMergingConfig(ratio=0.5))    # or a preset: "balanced"
    image = pipe("a red circle left of a blue square").images[0]
    print(handle.stats)
    handle.remove()

Names are imported when they are first used, so that `import accel` costs nothing.
"""

from __future__ import annotations

import importlib
import os.path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import configs as configs
    from . import errors as errors
    from .api import accelerate
    from .core.schedule import Schedule
    from .errors import AccelError, AccelWarning
    from .handle import Handle
    from .methods.chunking.config import DynamicChunkingConfig
    from .methods.forecasting.config import ForecastConfig
    from .methods.merging.config import Matching, TokenMergingConfig
    from .methods.pruning.config import Selection, TokenPruningConfig
    from .methods.speculation.config import SpeculativeDecodingConfig
    from .stats import Stats

    __version__: str

__all__ = [
    "AccelError",
    "AccelWarning",
    "DynamicChunkingConfig",
    "ForecastConfig",
    "Handle",
    "Matching",
    "Schedule",
    "Selection",
    "SpeculativeDecodingConfig",
    "Stats",
    "TokenMergingConfig",
    "TokenPruningConfig",
    "__version__",
    "accelerate",
    "configs",
    "errors",
]

_HOME = {
    "AccelError": "accel.errors",
    "AccelWarning": "accel.errors",
    "DynamicChunkingConfig": "accel.methods.chunking.config",
    "ForecastConfig": "accel.methods.forecasting.config",
    "Handle": "accel.handle",
    "Matching": "accel.methods.merging.config",
    "Schedule": "accel.core.schedule",
    "Selection": "accel.methods.pruning.config",
    "SpeculativeDecodingConfig": "accel.methods.speculation.config",
    "Stats": "accel.stats",
    "TokenMergingConfig": "accel.methods.merging.config",
    "TokenPruningConfig": "accel.methods.pruning.config",
    "accelerate": "accel.api",
}
_SUBMODULES = ("configs", "core", "errors", "evaluation", "generation", "kernels", "methods", "pipelines")

# In a clone, the folders beside this one are its subpackages, as pyproject.toml declares. A process started in
# the clone (`python -m accel`, a spawned worker) finds this folder before the installed package.
_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isfile(os.path.join(_root, "pyproject.toml")):
    __path__.append(_root)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"accel.{name}")
    if name == "__version__":
        return _version()
    raise AttributeError(f"module 'accel' has no attribute {name!r}")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # half of what `import accel` would take

    try:
        return version("accel-image")
    except PackageNotFoundError:  # a bare source tree on the path
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
