"""What a configuration class stands for: a method, found in one table (`accel.methods.TABLE`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, ClassVar

from torch import nn

from accel.errors import UnsupportedError
from accel.stats import Stats

from .capability import Adapter


class Method(ABC):
    """One acceleration of one pipeline.

    A subclass is made from (target, config, stats) and refuses there whatever it cannot do; it changes nothing
    before `attach`.

    Attributes:
        name: in presets (`method: ...`), messages and stats.
        Stats: what it counts in.
        alone: it learns, step by step, from what the model computed for every token; beside another method on the
            same model it would take that one's merged or forecast predictions for computed ones.
        undo, handle: set by `accelerate`: what takes the method out again, and what the user got. Whatever keeps the method alive keeps the handle, so that a handle that nobody
            kept is still found.
    """

    name: ClassVar[str]
    Stats: ClassVar[type] = Stats
    alone: ClassVar[bool] = False
    handle: Any = None
    undo: ExitStack

    @abstractmethod
    def __init__(self, target: Any, config: Any, stats: Any) -> None: ...

    @classmethod
    @abstractmethod
    def take_apart(cls, pipe: Any, find: Callable[[nn.Module], Adapter]) -> Any:
        """The pipeline taken apart. Its `subject` is what the method changes, for which handles are kept; its `loop`
        is what the method follows: two pipelines with schedulers of their own may share a denoiser.

        Args:
            find: denoiser -> its adapter.

        Raises:
            UnsupportedError: the method is not for such pipelines.
        """

    @abstractmethod
    def attach(self, stack: ExitStack) -> None:
        """Change the pipeline; every undo action goes onto `stack`."""

    def compile(self, how: bool | str, stack: ExitStack) -> None:
        """Run what the pipeline calls compiled, or as CUDA graphs; every undo action goes onto `stack`.

        Raises:
            UnsupportedError: the method is not for pipelines for which that can be done.
        """
        raise UnsupportedError(
            f"compile={how!r} is for diffusers pipelines. An autoregressive pipeline has pipe.compile(), and "
            "SpeculativeDecodingConfig(compile=True)."
        )

    @property
    def compiled(self) -> str:
        """What of that is in use; "" for nothing."""
        return ""
