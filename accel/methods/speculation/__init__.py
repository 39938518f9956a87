"""Speculative decoding for autoregressive image models: windows of drafted tokens, verified in one forward.

`step.py` says why it is exact, `config.py` what can be set, `verify.py` what relaxing costs. Everything stands on
the contract in `accel.decoding` and knows no model.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from accel.errors import UnsupportedError

from .config import SpeculativeDecodingConfig
from .decoder import SpeculativeDecoder
from .stats import SpeculationStats as Stats

__all__ = ["NAME", "SpeculativeDecoder", "SpeculativeDecodingConfig", "Stats", "Target", "attach"]

NAME = "speculative_decoding"

_MISSING = object()


@dataclass(frozen=True)
class Target:
    """A pipeline that draws its tokens through a `decoder`. It is only referred to weakly.

    Attributes:
        denoiser: what handles are kept for: the pipeline itself, in which exactly one attribute changes.
    """

    pipe: weakref.ref

    @property
    def denoiser(self) -> Any:
        return self.pipe()

    @staticmethod
    def of(pipe: Any) -> Target:
        """
        Raises:
            UnsupportedError: not a pipeline with a decoder.
        """
        decoder = getattr(pipe, "decoder", None)
        if not callable(decoder) or isinstance(decoder, nn.Module):  # some pipelines call a network that
            raise UnsupportedError(
                f"speculative decoding needs an autoregressive pipeline (AutoregressivePipeline, or any with a "
                f"`decoder`), got {type(pipe).__name__}"
            )
        return Target(weakref.ref(pipe))


def attach(
    target: Target, config: SpeculativeDecodingConfig, stats: Stats, stack: ExitStack
) -> SpeculativeDecoder:
    """Put a `SpeculativeDecoder` into the pipeline; the undo action goes onto `stack`."""
    decoder = SpeculativeDecoder(config, stats)
    before = vars(target.denoiser).get("decoder", _MISSING)
    target.denoiser.decoder = decoder

    def undo() -> None:
        pipe = target.denoiser
        if pipe is None:
            return
        if before is _MISSING:
            del pipe.decoder  # it was the class's
        else:
            pipe.decoder = before

    stack.callback(undo)
    return decoder
