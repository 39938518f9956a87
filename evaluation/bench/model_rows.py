"""What `accel bench model` compares: a method or a peer, and how it runs (compiled, in CUDA graphs, without kernels).

A row is named `BASE[+compiled][+graphs][+auto][+reference][@SIZE]`. A number in BASE is the share of the tokens that
are computed; SIZE, in pixels, is the only one at which the row runs.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import accel
from accel import configs
from accel.core.schedule import Schedule
from accel.errors import AccelWarning, ConfigError, UnknownNameError
from accel.evaluation.configurations import PLAIN, Configuration
from accel.methods.chunking import DynamicChunkingConfig
from accel.methods.forecasting import ForecastConfig
from accel.methods.merging import TokenMergingConfig
from accel.methods.pruning import TokenPruningConfig
from accel.methods.speculation import SpeculativeDecodingConfig

from .peers import Peer

Kind = Literal["dense", "reduced", "skipped"]
KINDS: tuple[Kind, ...] = ("dense", "reduced", "skipped")
COMPILED, GRAPHS, AUTO, REFERENCE = "compiled", "graphs", "auto", "reference"
_SHORT = 10  # steps of a loop that has nothing to forecast: one like the other


@dataclass(frozen=True)
class Row:
    """One row of the comparison.

    Attributes:
        name: as asked for, without a size.
        configuration: a method of ours, a peer's, or none.
        total: denoising steps of a picture.
        ways: of `COMPILED`, `GRAPHS`, `AUTO`, `REFERENCE`.
        size: the only one at which it runs; None: all.
    """

    name: str
    configuration: Configuration
    total: int
    ways: frozenset[str] = frozenset()
    size: int | None = None

    @property
    def base(self) -> str:
        return self.configuration.name

    @property
    def steps(self) -> int:
        """Of a timed loop: all, where a step depends on where in the picture it is."""
        whole = isinstance(self.configuration, Peer) or "skipped" in (self.schedule() or ())
        return self.total if whole else min(self.total, _SHORT)

    def schedule(self) -> list[Kind] | None:
        """What each step of a picture does; None where only the run can tell."""
        if isinstance(self.configuration, Peer):
            return None
        if self.configuration.method is None:
            return ["dense"] * self.total
        phases = self.configuration.method.full_schedule.phases(self.total)
        return [kind(phase.budget, 1) for phase in phases]

    @contextmanager
    def attached(self, pipe: Any) -> Iterator[Any]:
        """The pipeline as this row has it; gives the handle, or None where accel is not attached."""
        with ExitStack() as stack:
            if REFERENCE in self.ways:
                stack.enter_context(accel.kernels.use("reference"))
            if self.compile is False:
                yield stack.enter_context(self.configuration.attach(pipe))
            elif isinstance(self.configuration, Peer):
                stack.enter_context(self.configuration.attach(pipe))
                pipe.transformer.compile_repeated_blocks()  # as cache-dit's manual has it
                yield None
            else:
                yield stack.enter_context(_compiled(pipe, self.configuration.method, self.compile))

    @property
    def compile(self) -> str | bool:
        """What `accel.accelerate` takes as `compile`."""
        if AUTO in self.ways:
            return True
        parts = [{COMPILED: "blocks", GRAPHS: "graphs"}[w] for w in (COMPILED, GRAPHS) if w in self.ways]
        return "+".join(parts) or False


def kind(computed: float, total: float) -> Kind:
    return "dense" if computed >= total else "reduced" if computed else "skipped"


@contextmanager
def _compiled(pipe: Any, method: Any, compile: str | bool) -> Iterator[Any]:
    """A pipeline without a method goes the same way, by a schedule that leaves nothing out."""
    with warnings.catch_warnings():
        if method is None:
            warnings.simplefilter("ignore", AccelWarning)  # that it accelerates nothing
            method = ForecastConfig(dense_steps_first=10_000)
        with accel.accelerate(pipe, method, compile=compile) as handle:
            yield handle


def presets() -> list[str]:
    """Those for denoisers."""
    return [name for name in configs.names() if not isinstance(configs.load(name), SpeculativeDecodingConfig)]


def parse(names: str, total: int, calls: int = 1) -> list[Row]:
    """Rows from a comma-separated list.

    Args:
        total: denoising steps of a picture.
        calls: of the denoiser in a step, which cache-dit has to be told.

    Raises:
        ConfigError: no such base or way; a size that is no number.
    """
    return [_row(name.strip(), total, calls) for name in names.split(",") if name.strip()]


def _row(name: str, total: int, calls: int) -> Row:
    name, at, size = name.partition("@")
    if at and not size.isdecimal():
        raise ConfigError(f"row {name}@{size}: a size in pixels follows the @, such as {name}@512")
    base, *ways = (PLAIN + "+compiled" if name == COMPILED else name).split("+")
    for way in ways:
        if way not in (COMPILED, GRAPHS, AUTO, REFERENCE):
            raise UnknownNameError("way to run", way, (COMPILED, GRAPHS, AUTO, REFERENCE))
    configuration = _configuration(base, total, calls)
    if isinstance(configuration, Peer) and set(ways) - {COMPILED}:
        raise ConfigError(f"row {name}: what is not accel's runs as it is, or +{COMPILED}")
    return Row(name, configuration, total, frozenset(ways), int(size) if at else None)


def _configuration(base: str, total: int, calls: int) -> Configuration:
    if base == PLAIN:
        return Configuration(PLAIN)
    if base in presets():
        return Configuration(base, configs.load(base))
    if base in PEERS:
        return PEERS[base](total, calls)
    match = re.fullmatch(r"([a-z]+)-(0?\.\d*[1-9]\d*)((?:-alone)?)", base)
    make = _SHARES.get(match[1] + match[3]) if match else None
    if match is None or make is None:
        shares = [name.replace("-", "-0.5-") if "-" in name else f"{name}-0.5" for name in _SHARES]
        raise UnknownNameError("row", base, (PLAIN, *presets(), *PEERS, *shares))
    return Configuration(base, make(float(match[2])))


# As much of the picture as can be is reduced: a step is what is measured.
_REDUCED = Schedule(dense_first=2, dense_last=0, refresh_every=1)

#: Method -> share of the tokens -> its configuration.
_SHARES: dict[str, Callable[[float], Any]] = {
    "merging": lambda share: TokenMergingConfig(ratio=1 - share, schedule=_REDUCED),
    "windows": lambda share: TokenMergingConfig(ratio=1 - share, groups="windows", schedule=_REDUCED),
    "chunking": lambda share: DynamicChunkingConfig(budget=share, dense_steps_first=2),
    "pruning": lambda share: TokenPruningConfig(budget=share, cycle=(share,), dense_steps_last=0),
    "pruning-alone": lambda share: TokenPruningConfig(
        budget=share, cycle=(share,), keys_values="none", dense_steps_last=0
    ),
}


def mask(total: int, preset: str) -> list[int]:
    """1 for each step that a preset of forecasts computes."""
    return [int(phase.budget > 0) for phase in configs.load(preset).full_schedule.phases(total)]


def _cache_dit(preset: str, total: int, calls: int) -> Peer:
    """The preset's very steps, by cache-dit's own mask; its first block runs at every step, as by default."""
    computed = mask(total, preset)
    options: Mapping[str, Any] = {
        "Fn_compute_blocks": 1,
        "Bn_compute_blocks": 0,
        "residual_diff_threshold": 9,
        "steps_computation_mask": computed,
        "steps_computation_policy": "static",
        "max_warmup_steps": (*computed, 0).index(
            0
        ),  # its default computes the first eight whatever the mask says
        "enable_separate_cfg": calls > 1,
        "taylorseer": 1,
    }
    return Peer(f"cache-dit-{preset}", package="cache_dit", kind="cache-dit", total=total, options=options)


def _taylorseer(total: int, calls: int) -> Peer:
    """diffusers' lighter form, which forecasts the last projection alone."""
    options = {"cache_interval": 3, "max_order": 1, "use_lite_mode": True, "disable_cache_before_step": 6}
    return Peer("taylorseer", package="diffusers", kind="TaylorSeer", total=total, options=options)


def _magcache(total: int, calls: int) -> Peer:
    """Bound by its number of skipped steps alone: what it measures of random weights means nothing."""
    options = {"threshold": 1e9, "max_skip_steps": 1, "retention_ratio": 6.2 / total}
    return Peer("magcache", package="diffusers", kind="MagCache", total=total, options=options)


def _forecast(name: str, cycle: tuple[int, ...], total: int, calls: int) -> Configuration:
    return Configuration(name, ForecastConfig(cycle=cycle, dense_steps_first=6, dense_steps_last=0))


#: Name -> (denoising steps, calls in each) -> what runs. Each peer stands beside a row of ours that computes the same
#: steps: the preset it is named after, or the forecasts that follow it here. FirstBlockCache and TeaCache have none:
#: what they skip depends on the picture.
PEERS: dict[str, Callable[[int, int], Configuration]] = {
    "cache-dit-balanced": partial(_cache_dit, "balanced"),
    "cache-dit-fast": partial(_cache_dit, "fast"),
    "taylorseer": _taylorseer,
    "forecast-3rd": partial(_forecast, "forecast-3rd", (0, 1, 0)),
    "magcache": _magcache,
    "forecast-2nd": partial(_forecast, "forecast-2nd", (0, 1)),
}


def every(device: str) -> list[str]:
    """All rows, what matters most first."""
    methods = [
        "merging-0.5",
        "windows-0.5",
        "merging-0.25",
        "pruning-0.3",
        "pruning-0.3-alone",
        "chunking-0.5",
    ]
    ways: Sequence[str] = ("graphs", "compiled+graphs") if device.startswith("cuda") else ()
    return [
        *(base + way for base in (PLAIN, *methods) for way in ("", "+compiled")),
        *(f"{base}+{way}" for base in (PLAIN, *methods, "balanced") for way in ways),
        *presets(),
        *PEERS,
        *(f"{base}+{way}" for base in ("balanced", "cache-dit-balanced") for way in (COMPILED,)),
        *(f"{base}+{AUTO}" for base in (PLAIN, "merging-0.5", "balanced")),
        *(f"{base}+{REFERENCE}" for base in ("merging-0.5", "windows-0.5", "pruning-0.3")),
    ]
