"""The decoder that `accel.accelerate` puts into a pipeline.

Shapes: B images, W tokens of a window, N slots of an image, V vocabulary, D codebook.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from accel.core.decoding import PlainRound, Sampling, TokenModel, decode
from accel.core.randomness import Randomness
from accel.core.rounds import reach, rounds_of
from accel.errors import AccelWarning, ConfigError, UnsupportedError

from . import windows
from .config import SpeculativeDecodingConfig
from .loop import Step, begin_round, finished_leave, ring_of, speculate, step_of
from .stats import SpeculationStats
from .verify import rule_of


class SpeculativeDecoder:
    """An `accel.core.decoding.Decoder`: the same law of images as `decode`, in fewer forwards.

    An image depends on its own generator alone, whatever else is in the batch, as long as the window is the same
    (with noise verification, whatever the window is). Knows nothing about model families. A model may offer
    `codebook_VD`, the embedding of each token, for the distance filter.

    Args:
        config, stats: what to do, and where to say what was done.
        timer: times a round (`windows.seconds`).
    """

    def __init__(
        self,
        config: SpeculativeDecodingConfig,
        stats: SpeculationStats | None = None,
        timer: windows.Timer = windows.seconds,
    ) -> None:
        self.config, self.stats = config, stats or SpeculationStats()
        self.owner: Any = None  # what put it into a pipeline
        self._timer = timer
        self._gains: dict[tuple, windows.Gain] = {}
        self._timed: dict[tuple, dict[int, float]] = {}
        self._warned: set[tuple] = set()
        self._steps: dict[tuple, tuple[Tensor | None, Step]] = {}

    @torch.no_grad()
    def __call__(
        self,
        model: TokenModel,
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        on_slots: Callable[[int], None] = lambda slots: None,
    ) -> Tensor:
        """See `accel.core.decoding.Decoder`.

        Raises:
            ConfigError: groups of more tokens than the vocabulary has.
            UnsupportedError: a distance filter without a codebook.
        """
        slots, began = model.forced_N.shape[0], time.perf_counter()
        step = self._step(model, sampling)
        rounds_of(model).turn_to(self, sampling)
        width = self._width(model, sampling, step) if slots > 1 else 1
        if width == 1:
            token_BN = decode(model, sampling, generators, on_slots)
            self.stats.record_plain(model.images, slots, time.perf_counter() - began)
            return token_BN
        late = _late(model)
        randomness = self._randomness(model, sampling, width, generators)
        state, forwards = speculate(
            model, sampling, self.config, width, step, randomness, on_slots, late=late, key=(self, sampling)
        )
        self.stats.record(state, forwards, width, slots, time.perf_counter() - began)
        # A batch takes the forwards of its slowest image: the larger it is, the less it gains. Where finished images
        # leave, its last forwards are cheaper: a third is as it was (built-in model, float32: one image of four takes 0.44).
        # A captured forward reads the weights for few images as for many.
        cheaper = finished_leave(model, self.config) and not late
        own = float(state.forwards_B.double().mean()) if cheaper else forwards
        self._gain(model).learn(width, (slots - 1) / ((forwards + 2 * own) / 3))
        return state.token_BS[:, :slots]

    def _gain(self, model: TokenModel) -> windows.Gain:
        return self._gains.setdefault(_kind(model), windows.Gain())

    def _step(self, model: TokenModel, sampling: Sampling) -> Step:
        config, codebook_VD = self.config, getattr(model, "codebook_VD", None)
        if config.group_size > model.vocabulary:
            raise ConfigError(
                f"group_size must be 1 to the model's vocabulary of {model.vocabulary}, got {config.group_size}"
            )
        grouped = config.relaxation == "group" and not config.lossless
        if grouped and config.distance_filter is not None and codebook_VD is None:
            raise UnsupportedError(
                f"distance_filter={config.distance_filter} needs the model's codebook, which "
                f"{type(model).__name__} does not offer: pass distance_filter=None"
            )
        # Kept, because a new one would be compiled anew. Nothing but the distance filter sees the codebook.
        slots, row = model.forced_N.shape[0], getattr(model, "row", 0)
        key = (sampling, slots, row, model.first_BV.device)
        used_VD = codebook_VD if grouped and config.distance_filter is not None else None
        if key in self._steps:
            of_VD, step = self._steps[key]
            if of_VD is used_VD:
                return step
        step = step_of(config, sampling, rule_of(config, used_VD), slots, row)
        self._steps[key] = used_VD, step
        return step

    def _width(self, model: TokenModel, sampling: Sampling, step: Step) -> int:
        """Tokens to feed per forward; 1: decode plainly."""
        config, slots = self.config, model.forced_N.shape[0]
        if config.window == "auto":
            widths = [w for w in windows.WIDTHS if w <= slots] or [slots]
        else:
            widths = [min(config.window, slots)]
        if len(widths) == 1 and not config.auto_disable:
            return widths[0]
        key, gain = _kind(model), self._gain(model)
        if key not in self._timed:
            self._timed[key] = windows.time_widths(
                widths, lambda width: self._seconds(model, sampling, step, width), gain
            )
        timed = self._timed[key]
        width, speedup = windows.choose(timed, gain)
        pays = speedup >= 1 or not config.auto_disable
        rounds_of(model).narrow(self, width if pays else 1)
        if pays:
            return width
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(
                f"speculative decoding does not pay for a batch of {model.images} here: a round of {width} tokens "
                f"takes {timed[width] / timed[1]:.1f} times as long as one token and finishes about "
                f"{gain(width):.1f}. Such batches are decoded plainly; auto_disable=False keeps windows.",
                AccelWarning,
                stacklevel=3,
            )
        return 1

    def _randomness(
        self, model: TokenModel, sampling: Sampling, width: int, generators: Sequence[torch.Generator]
    ) -> Randomness:
        device, slots = model.first_BV.device, model.forced_N.shape[0]
        ring = ring_of(self.config, width, _late(model))
        kept = rounds_of(model).keep(
            (self, "randomness", width), lambda: Randomness(generators, model.vocabulary, slots, ring, device)
        )
        kept.restart(generators)
        return kept

    def _seconds(self, model: TokenModel, sampling: Sampling, step: Step, width: int) -> float:
        return self._timer(self.round(model, sampling, width, step), model.first_BV.device)

    def round(
        self, model: TokenModel, sampling: Sampling, width: int, step: Step | None = None
    ) -> Callable[[], None]:
        """A round in the middle of an image, to be timed; what it leaves in the cache is written over later.

        Args:
            width: 1: plain decoding's.
        """
        device, rounds = model.first_BV.device, rounds_of(model)
        # Made-up numbers: the images' own generators must not notice.
        generators = [torch.Generator(device).manual_seed(0)] * model.images
        turn: Callable[[TokenModel], None]
        if width == 1:
            key: tuple = (decode, sampling)
            rounds.turn_to(*key)
            plain = rounds.keep(key, lambda: PlainRound(model, sampling, generators))
            plain.begin(model, generators)
            turn = plain
        else:
            step = step or self._step(model, sampling)
            randomness = self._randomness(model, sampling, width, generators)
            turn = begin_round(model, sampling, self.config, width, step, randomness, (self, sampling))
            key = (self, sampling, width)
        seen = reach(model, width, model.forced_N.shape[0] // 2)
        return lambda: rounds.run((*key, seen), partial(turn, model))


def _late(model: TokenModel) -> bool:
    """Whether the host reads of each round only when the next is on its way: where rounds are queued."""
    return model.first_BV.device.type == "cuda" or rounds_of(model).captures


def _kind(model: TokenModel) -> tuple:
    """What the time of a round, and what it yields, are remembered for."""
    shape = (model.images, model.vocabulary, model.forced_N.shape[0], getattr(model, "guided", False))
    dtype = getattr(model, "dtype", model.first_BV.dtype)
    return *shape, dtype, model.first_BV.device, rounds_of(model).captures
