"""A pipeline taken apart."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn

from accel.errors import UnsupportedError

from .capability import Adapter, denoisers_of


@dataclass(frozen=True)
class Target:
    """A pipeline taken apart. The pipeline itself is only referred to weakly.

    Attributes:
        denoiser: what the pipeline calls at every step, without torch.compile's wrapper.
        beside: further modules that it calls at every step (a branch of guidance in a module of its own).
        scheduler: whose steps are followed.
    """

    pipe: weakref.ref
    denoiser: nn.Module
    beside: tuple[nn.Module, ...]
    adapter: Adapter
    scheduler: Any

    @property
    def subject(self) -> nn.Module:
        return self.denoiser

    @property
    def loop(self) -> Any:
        return self.scheduler

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return (self.denoiser, *self.beside)

    def alone(self, setting: str) -> nn.Module:
        """The denoiser, for a setting that knows of one module.

        Raises:
            UnsupportedError: there is another beside it.
        """
        if self.beside:
            raise UnsupportedError(
                f"{setting} is for one denoiser, and {type(self.denoiser).__name__} has another module beside it for a branch "
                f"of guidance: leave {setting} out"
            )
        return self.denoiser

    @property
    def outers(self) -> list[nn.Module]:
        """What the pipeline calls now: the denoisers, or torch.compile's wrappers around them."""
        pipe = self.pipe()
        current = [] if pipe is None else denoisers_of(pipe)
        return [next((o for o, inner in current if inner is module), module) for module in self.modules]

    def tokens(self, grid: tuple[int, int], references: int = 0) -> int:
        """Image tokens of this grid, and those of its references, over all blocks."""
        assert self.adapter.tokens is not None
        return sum(prod(site.grid(grid)) + references for site in self.adapter.tokens.sites(self.denoiser))
