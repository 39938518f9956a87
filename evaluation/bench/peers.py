"""The peers, each setting a configuration that `accel.evaluation` runs, times and scores like its own.

A peer's own options are passed to its own functions; nothing of it is written again here.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from accel import configs
from accel.core.schedule import Schedule
from accel.evaluation.configurations import Configuration
from accel.methods.chunking import DynamicChunkingConfig
from accel.methods.forecasting import ForecastConfig
from accel.methods.merging import TokenMergingConfig
from accel.methods.pruning import Selection, TokenPruningConfig

#: What each peer has to do: (pipeline, number of steps, options) -> the undo action.
Enable = Callable[[Any, int, Mapping[str, Any]], Callable[[], None]]


@dataclass(frozen=True)
class Peer(Configuration):
    """A setting of another library.

    Attributes:
        package: what has to be installed.
        kind: the library's method, a key of `ENABLE`.
        total: denoising steps of the run.
        options: of that method.
    """

    package: str = ""
    kind: str = ""
    total: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        return False

    @property
    def missing(self) -> bool:
        return importlib.util.find_spec(self.package) is None

    def describe(self) -> dict[str, Any]:
        return {"method": {"type": self.kind, **self.options}, "steps": None}

    @contextmanager
    def attach(self, pipe: Any) -> Iterator[None]:
        with copied(pipe):
            undo = ENABLE[self.kind](pipe, self.total, self.options)
            try:
                yield
            finally:
                undo()


@contextmanager
def copied(pipe: Any) -> Iterator[None]:
    """The pipeline with a copy of its transformer, which shares the weights and is thrown away.

    Peers do not clean up: diffusers 0.42's `disable_cache` leaves its `forward` and `_diffusers_hook` on every
    block, cache-dit 1.5's the patched `forward` and `_is_patched` on the transformer. The plain pictures stay
    bit-equal, but later rows would be timed with, and skip the patches of, earlier ones.
    """
    original = pipe.transformer
    shared = []
    if isinstance(original, nn.Module):
        shared = [*original.parameters(), *original.buffers()]
    pipe.transformer = copy.deepcopy(original, {id(tensor): tensor for tensor in shared})
    try:
        yield
    finally:
        pipe.transformer = original


def _diffusers(config: Any, pipe: Any) -> Callable[[], None]:
    pipe.transformer.enable_cache(config)
    return pipe.transformer.disable_cache


def _first_block(pipe: Any, total: int, options: Mapping[str, Any]) -> Callable[[], None]:
    from diffusers import FirstBlockCacheConfig

    return _diffusers(FirstBlockCacheConfig(**options), pipe)


def _taylorseer(pipe: Any, total: int, options: Mapping[str, Any]) -> Callable[[], None]:
    import torch
    from diffusers import TaylorSeerCacheConfig

    # Factors in the model's precision: bfloat16, the default, would hold a float32 model back.
    return _diffusers(TaylorSeerCacheConfig(taylor_factors_dtype=torch.float32, **options), pipe)


def _magcache(pipe: Any, total: int, options: Mapping[str, Any]) -> Callable[[], None]:
    from diffusers import MagCacheConfig
    from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

    options = dict(options)
    ratios = _magnitudes(pipe, total) if options.pop("calibrated", False) else FLUX_MAG_RATIOS
    return _diffusers(MagCacheConfig(num_inference_steps=total, mag_ratios=ratios, **options), pipe)


#: Scheduler, which all copies of a pipeline share -> its ratios for a number of steps.
_MAGNITUDES: WeakKeyDictionary[Any, dict[int, list[float]]] = WeakKeyDictionary()


def _magnitudes(pipe: Any, total: int) -> list[float]:
    """MagCache's own calibration, on one prompt: the ratios that it prints at the end, for the first branch of
    guidance (it has room for one)."""
    from diffusers import MagCacheConfig

    known = _MAGNITUDES.setdefault(pipe.scheduler, {})
    if total not in known:
        printed = io.StringIO()
        with copied(pipe), redirect_stdout(printed):
            _diffusers(MagCacheConfig(num_inference_steps=total, calibrate=True), pipe)
            pipe("a photo", num_inference_steps=total, output_type="latent")
        lists = [
            line for line in printed.getvalue().splitlines() if line.startswith("[") and line.endswith("]")
        ]
        known[total] = json.loads(lists[0])
    return known[total]


def _broadcast(pipe: Any, total: int, options: Mapping[str, Any]) -> Callable[[], None]:
    from diffusers import PyramidAttentionBroadcastConfig

    now = {"current_timestep_callback": lambda: pipe.current_timestep}
    return _diffusers(PyramidAttentionBroadcastConfig(**now, **options), pipe)


def _cache_dit(pipe: Any, total: int, options: Mapping[str, Any]) -> Callable[[], None]:
    import cache_dit

    options = dict(options)
    order, policy = options.pop("taylorseer", None), options.pop("mask", None)
    steps, kind = options.pop("steps", None), options.pop("calibrator", None)
    if policy is not None:
        mask = cache_dit.steps_mask(total_steps=total, mask_policy=policy)
        options["steps_computation_mask"] = mask
    if steps is not None:
        options["steps_computation_mask"] = [int(step in steps) for step in range(total)]
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
    if kind is not None:  # DMD and FoCa came with 1.5
        calibrator = getattr(cache_dit, f"{kind}CalibratorConfig")()
    # It knows pipelines by class name; a subclass goes by the name of what it derives from.
    wrapped = _as_diffusers(pipe)
    # Calls alternate between the branches of guidance, unless told otherwise.
    options = {"enable_separate_cfg": True, **options}
    config = cache_dit.DBCacheConfig(num_inference_steps=total, **options)
    cache_dit.enable_cache(wrapped, cache_config=config, calibrator_config=calibrator)
    return lambda: cache_dit.disable_cache(wrapped)


def _as_diffusers(pipe: Any) -> Any:
    """The same models and scheduler in diffusers' own pipeline class."""
    cls = next(c for c in type(pipe).__mro__ if c.__module__.startswith("diffusers."))
    return pipe if type(pipe) is cls else cls(**pipe.components)


ENABLE: dict[str, Enable] = {
    "FirstBlockCache": _first_block,
    "TaylorSeer": _taylorseer,
    "MagCache": _magcache,
    "PyramidAttentionBroadcast": _broadcast,
    "cache-dit": _cache_dit,
}


def fewer_steps(steps: int) -> list[Configuration]:
    """The comparison that costs nothing: the plain pipeline with fewer steps."""
    counts = sorted({max(1, round(steps * share)) for share in (0.75, 0.5, 0.33, 0.25)} - {steps})
    return [Configuration(f"steps={n}", steps=n) for n in reversed(counts)]


def theirs(steps: int) -> list[Peer]:
    """Settings of the peers from careful to fast."""

    def peers(
        short: str, kind: str, package: str, settings: list[dict[str, Any]], same: Mapping[str, Any] = {}
    ) -> list[Peer]:
        """`same`: defaults, which names leave out."""
        return [
            Peer(
                "-".join([short, *map(_label, s.items())]),
                package=package,
                kind=kind,
                total=steps,
                options={**same, **s},
            )
            for s in settings
        ]

    db = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 2}
    return [
        *peers("fbc", "FirstBlockCache", "diffusers", [{"threshold": t} for t in (0.03, 0.06, 0.1, 0.2)]),
        *peers(
            "taylorseer",
            "TaylorSeer",
            "diffusers",
            [
                *({"cache_interval": n, "max_order": o} for n, o in ((2, 1), (3, 1), (4, 1), (6, 1), (4, 2))),
                # Its variant that forecasts the last projection alone, from the first step on where ours do.
                *(
                    {"cache_interval": n, "use_lite_mode": True, "disable_cache_before_step": w}
                    for n, w in ((2, 8), (3, 7), (4, 6), (5, 5), (6, 4))
                ),
            ],
        ),
        *peers(
            "magcache",
            "MagCache",
            "diffusers",
            [
                *({"threshold": t} for t in (0.03, 0.06, 0.12, 0.24)),
                *({"threshold": t, "calibrated": True} for t in (0.03, 0.06, 0.12, 0.24)),
            ],
        ),
        *peers(
            "pab",
            "PyramidAttentionBroadcast",
            "diffusers",
            [{"spatial_attention_block_skip_range": n} for n in (2, 3, 5)],
        ),
        *peers(
            "dbcache",
            "cache-dit",
            "cache_dit",
            [
                *({"residual_diff_threshold": t} for t in (0.04, 0.08, 0.16, 0.32)),
                *({"residual_diff_threshold": t, "taylorseer": 1} for t in (0.08, 0.16, 0.32)),
                *({"residual_diff_threshold": 0.5, "taylorseer": 1, "mask": m} for m in ("medium", "fast")),
                # As many steps at the start as ours, then a fixed pattern: no threshold stops it.
                *(
                    {
                        "residual_diff_threshold": 9,
                        "taylorseer": 1,
                        "max_warmup_steps": w,
                        "max_continuous_cached_steps": n,
                    }
                    for w, n in ((8, 1), (7, 2), (6, 3))
                ),
            ],
            same=db,
        ),
    ]


def ours(steps: int) -> list[Configuration]:
    """The presets, forecasts without what makes up for them, and accel's other methods."""
    settings = _few() if steps <= 8 else _many()
    if steps > 6:
        settings["cat"] = TokenPruningConfig.cat()
    return [Configuration(name, config) for name, config in settings.items()]


def _many() -> dict[str, Any]:
    """For 9 steps and more: whole steps can be left out."""
    presets = {name: configs.load(name) for name in ("quality", "balanced", "fast", "draft")}
    # Between the presets, and sparser than they are.
    dense: dict[str, Any] = {"dense_steps_first": 7, "dense_steps_last": 0}
    return {
        **presets,
        "sparse-6": ForecastConfig(
            schedule=Schedule(
                cycle=(0, 1), late_cycle=(0, 0, 0, 1), late_from=0.33, dense_first=6, dense_last=0
            ),
            correct=True,
        ),
        "sparse-3": ForecastConfig(
            schedule=Schedule(
                cycle=(0, 1, 0, 0, 1), late_cycle=(0,) * 6 + (1,), late_from=0.33, dense_first=3, dense_last=0
            ),
            trend=0.5,
            correct=True,
        ),
        **{f"{name}-uncorrected": replace(config, correct=False) for name, config in presets.items()},
        "forecast-2nd": ForecastConfig(cycle=(0, 1)),
        "forecast-3rd": ForecastConfig(cycle=(0, 0, 1)),
        "forecast-4th": ForecastConfig(cycle=(0, 0, 0, 1)),
        "merging": configs.load("merging"),
        "tomesd": configs.load("tomesd"),
        "prune-25": TokenPruningConfig(cycle=(0, 0.25, 1), **dense),
        "prune-50": TokenPruningConfig(cycle=(0, 0.5, 1), **dense),
        "prune-25-long": TokenPruningConfig(cycle=(0, 0.25, 0, 1), **dense),
        "prune-25-no-kv": TokenPruningConfig(cycle=(0, 0.25, 1), keys_values="none", **dense),
        "prune-25-clusters": TokenPruningConfig(
            cycle=(0, 0.25, 1), selection=Selection(clusters=16), **dense
        ),
        "guidance-2nd": ForecastConfig(schedule=Schedule(cycle=(1,), guidance_every=2)),
        "guidance-2nd-forecast-2nd": ForecastConfig(schedule=Schedule(cycle=(0, 1), guidance_every=2)),
    }


def _few() -> dict[str, Any]:
    """For 4 to 8 steps: what saves within each of them, and forecasts to compare."""
    dense: dict[str, Any] = {"dense_steps_first": 2, "dense_steps_last": 0}
    return {
        "few-step": configs.load("few-step"),
        "tomesd": configs.load("tomesd"),
        "forecast-2nd": ForecastConfig(cycle=(0, 1), **dense, correct=True),
        "forecast-2nd-uncorrected": ForecastConfig(cycle=(0, 1), **dense),
        "prune-50": TokenPruningConfig(cycle=(0.5,), **dense),
        "prune-75": TokenPruningConfig(cycle=(0.75,), **dense),
        "prune-50-no-kv": TokenPruningConfig(cycle=(0.5,), keys_values="none", **dense),
        "prune-50-clusters": TokenPruningConfig(cycle=(0.5,), selection=Selection(clusters=16), **dense),
        "guidance-2nd": ForecastConfig(schedule=Schedule(cycle=(1,), guidance_every=2)),
    }


def few_step(steps: int, adapter: Path | None = None) -> list[Configuration]:
    """For `accel bench few-step`: today's ways with 4 to 8 steps, and windows of several budgets, alone and with forecast steps
    in one schedule; and those again with an `adapter`, the side-car of an upcycled model, if there is one."""
    settings = {**_few(), **_composed(steps)}
    if adapter is not None:
        settings |= _upcycled(settings, str(adapter))
    wanted = ("fbc-0.1", "fbc-0.2", "dbcache-0.16", "dbcache-0.32", "dbcache-0.32-taylor1")
    caches = [peer for peer in theirs(steps) if peer.name in wanted]
    ours = [Configuration(name, config) for name, config in settings.items()]
    return [*(c for c in fewer_steps(steps) if c.steps != 1), *caches, *ours]


def _windows(*cycle: float, late: float | None = None, **settings: Any) -> TokenMergingConfig:
    """A dense first step, then these budgets in turn; the late one in the second half of the run."""
    late_cycle = None if late is None else (late,)
    schedule = Schedule(cycle=cycle, late_cycle=late_cycle, dense_first=1, dense_last=0, refresh_every=1)
    return TokenMergingConfig(groups="windows", schedule=schedule, **settings)


def _composed(steps: int) -> dict[str, Any]:
    matched = TokenMergingConfig(schedule=Schedule(dense_first=1, dense_last=0, refresh_every=1))
    found = {
        "matching-50": matched,
        "matching-33": replace(matched, ratio=0.67),
        "few-step-fast": configs.load("few-step-fast"),
        "windows-25": _windows(0.25),
        "windows-30": _windows(0.3),
        "windows-50": _windows(0.5),
        "windows-40-70": _windows(0.4, late=0.7),
        "windows-50-copy": _windows(0.5, unmerge="copy"),
        **_published(),
    }
    for left_out in _LEFT_OUT.get(steps, ()):
        computed = tuple(step for step in range(steps) if step not in left_out)
        name = "-".join(["forecast", *map(str, left_out)])
        found[name] = ForecastConfig(schedule=Schedule(steps=computed, total=steps), correct="auto")
    # After the dense first step: 1 dense, 0 forecast, between a share of the tokens.
    for name, cycle in _SCHEDULES.get(steps, {}).items():
        found[name] = _windows(*cycle, order=1)
    return found


def _upcycled(settings: dict[str, Any], adapter: str) -> dict[str, Any]:
    found = {"upcycled-20": _windows(0.2), "upcycled-28": _windows(0.28)}
    for name, config in settings.items():
        in_windows = isinstance(config, TokenMergingConfig) and config.windows
        if in_windows and any(0 < b < 1 for b in config.budgets) and config.unmerge == "carry":
            found[f"upcycled-{name.removeprefix('windows-').removeprefix('mixed-')}"] = config
    return {name: replace(config, adapter=adapter) for name, config in found.items()}


def _published() -> dict[str, DynamicChunkingConfig]:
    """Half of the tokens by DC-DiT's routers, untrained, with its Gaussian and without."""
    cosine = DynamicChunkingConfig.dc_dit()
    return {
        "cosine-50": cosine,
        "predictability-50": DynamicChunkingConfig.dc_dit(router="predictability"),
        "cosine-50-copy": replace(cosine, dechunk="copy"),
        "cosine-50-carry": replace(cosine, dechunk="carry"),
    }


#: Number of steps -> which are forecast, the others computed.
_LEFT_OUT: dict[int, tuple[tuple[int, ...], ...]] = {
    4: ((2,), (3,)),
    6: ((4,), (3, 5)),
    8: ((5,), (4, 6), (3, 5, 7)),
}
#: Number of steps -> schedules of dense, windowed and forecast steps.
_SCHEDULES: dict[int, dict[str, tuple[float, ...]]] = {
    4: {
        "mixed-50-50-0": (0.5, 0.5, 0),
        "mixed-33-33-0": (0.33, 0.33, 0),
        "mixed-50-0-50": (0.5, 0, 0.5),
        "mixed-60-40-0": (0.6, 0.4, 0),
    },
    6: {"mixed-50-50-50-0-50": (0.5, 0.5, 0.5, 0, 0.5), "mixed-33-33-33-0-33": (0.33, 0.33, 0.33, 0, 0.33)},
    8: {
        "mixed-1-1-1-0-1-0-1": (1, 1, 1, 0, 1, 0, 1),
        "mixed-1-1-1-0-50-0-50": (1, 1, 1, 0, 0.5, 0, 0.5),
        "mixed-1-1-1-0-40-0-40": (1, 1, 1, 0, 0.4, 0, 0.4),
        "mixed-1-1-80-0-40-0-40": (1, 1, 0.8, 0, 0.4, 0, 0.4),
        "mixed-1-1-50-0-50-0-50": (1, 1, 0.5, 0, 0.5, 0, 0.5),
        "mixed-70-0-70-0-40-0-40": (0.7, 0, 0.7, 0, 0.4, 0, 0.4),
        "mixed-50-0-50-0-50-0-50": (0.5, 0, 0.5, 0, 0.5, 0, 0.5),
        "mixed-50-50-50-0-50-0-50": (0.5, 0.5, 0.5, 0, 0.5, 0, 0.5),
        "mixed-33-33-33-0-33-0-33": (0.33, 0.33, 0.33, 0, 0.33, 0, 0.33),
    },
}


def _label(option: tuple[str, Any]) -> str:
    name, value = option
    short = {
        "threshold": "", "residual_diff_threshold": "", "cache_interval": "n", "max_order": "o",
        "spatial_attention_block_skip_range": "n", "taylorseer": "taylor", "mask": "", "use_lite_mode": "lite", "calibrated": "calibrated",
        "disable_cache_before_step": "w", "max_warmup_steps": "w", "max_continuous_cached_steps": "n",
    }  # fmt: skip
    return short[name] if value is True else f"{short[name]}{value}"
