"""Who is compared per computed step: accel's schedules, other libraries' forecasts at the same steps, solvers on them.

Not diffusers' SeaCache: in 0.42 it has an adapter for Cosmos alone, and computes every step of a pipeline that, as FLUX's,
does not tell it which step it is at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accel import configs
from accel.core.schedule import Schedule, growing
from accel.evaluation.configurations import Configuration
from accel.methods.forecasting import ForecastConfig

from .frontier import OURS, PEERS, STEPS
from .peers import Peer
from .solvers import Solver
from .spectrum import GROWTH, Spectrum
from .spectrum import steps as spectrum_steps

BOTH = "a peer with accel's correction"
#: Presets as they were before they were chosen anew, for comparison.
BEFORE: dict[str, dict[str, Any]] = {
    "fast": {"schedule": Schedule(growth=0.36), "trend": 0.75},
    "draft": {"schedule": Schedule(growth=0.7), "trend": 0.5},
}


@dataclass(frozen=True)
class Setting:
    """A configuration and whose it is."""

    item: Configuration
    group: str


def settings(total: int) -> list[Setting]:
    """Most telling first: a budget of minutes ends the list early."""
    masks = {name: _computed(configs.load(name), total) for name in ("fast", "draft", "balanced", "quality")}
    own = [Setting(Configuration(name, configs.load(name)), OURS) for name in ("fast", "draft", "balanced")]
    spectrum = spectrum_steps(total)
    at_spectrum = ForecastConfig(schedule=Schedule(steps=spectrum, total=total), trend=0.5, correct="auto")
    before = {name: ForecastConfig(**BEFORE[name], correct="auto") for name in BEFORE}
    on_points: list[Setting] = []
    for name in ("fast", "balanced"):
        steps = masks[name]
        on_points += [
            Setting(_cache_dit(f"dbcache-taylor-{name}", total, steps, taylorseer=1), PEERS),
            Setting(_cache_dit(f"dbcache-dmd-{name}", total, steps, calibrator="DMD"), PEERS),
            Setting(_cache_dit(f"dbcache-foca-{name}", total, steps, calibrator="FoCa"), PEERS),
            Setting(Solver(f"dpm++2m-{name}", rule="dpm++2m", points=steps), STEPS),
            Setting(Solver(f"unipc-{name}", rule="unipc", points=steps), STEPS),
            Setting(Solver(f"euler-{name}", rule="euler", points=steps), STEPS),
            Setting(Spectrum(f"spectrum-output-{name}", computed=steps), PEERS),
            Setting(Configuration(f"steps={len(steps)}", steps=len(steps)), STEPS),
        ]
    lite = [(n, w) for n, w in ((3, 7), (4, 6), (5, 5), (6, 4))]
    return [
        *own,
        *(Setting(_own(total, count), OURS) for count in _between(total)),
        *(Setting(Configuration(f"{name}-before", config), OURS) for name, config in before.items()),
        *_spectrum(total, len(masks["fast"])),
        *(Setting(_taylor(total, n, w), PEERS) for n, w in lite),
        *on_points[: len(on_points) // 2],
        *(Setting(_magcache(total, threshold), PEERS) for threshold in (0.06, 0.12, 0.24)),
        *on_points[len(on_points) // 2 :],
        Setting(Spectrum("spectrum-output-corrected", correct=True, computed=spectrum), BOTH),
        Setting(Configuration("ours-on-spectrum", at_spectrum), OURS),
        Setting(Configuration("quality", configs.load("quality")), OURS),
    ]  # fmt: skip


def _computed(config: Any, total: int) -> tuple[int, ...]:
    return tuple(step for step, phase in enumerate(config.full_schedule.phases(total)) if phase.budget > 0)


def _between(total: int) -> list[int]:
    """Computed steps of the presets before and of Spectrum, where no preset has as many now."""
    presets = {len(_computed(configs.load(name), total)) for name in ("fast", "draft", "balanced", "quality")}
    before = {len(_computed(ForecastConfig(**cycle), total)) for cycle in BEFORE.values()}
    return sorted((before | {len(spectrum_steps(total))}) - presets)


def _own(total: int, count: int) -> Configuration:
    """The presets' rule with as many steps."""
    growths = [round(0.02 + 0.01 * i, 2) for i in range(300)]
    off = {g: abs(len(growing(total, g, 0.5)) - count) for g in growths}
    nearest = [g for g in growths if off[g] == min(off.values())]
    growth = nearest[len(nearest) // 2]
    config = ForecastConfig(schedule=Schedule(growth=growth), trend=0.75, correct="auto")
    return Configuration(f"growth-{growth:g}", config)


def _spectrum(total: int, count: int) -> list[Setting]:
    """On its own schedule; and where that does not compute `count` steps, with the growth of its window nearest to its own
    that does."""
    masks = {"": spectrum_steps(total)}
    growths = [g for i in range(1, 200) if len(spectrum_steps(total, growth=(g := i / 100))) == count]
    if len(masks[""]) != count and growths:
        nearest = min(growths, key=lambda growth: abs(growth - GROWTH))
        masks[f"-{count}"] = spectrum_steps(total, growth=nearest)
    places = {"hidden": True, "output": False}
    return [
        Setting(Spectrum(f"spectrum-{place}{suffix}", hidden=hidden, computed=steps), PEERS)
        for place, hidden in places.items()
        for suffix, steps in masks.items()
    ]


def _taylor(total: int, every: int, warm: int) -> Peer:
    options = {"cache_interval": every, "use_lite_mode": True, "disable_cache_before_step": warm}
    return Peer(
        f"taylorseer-n{every}-lite-w{warm}",
        package="diffusers",
        kind="TaylorSeer",
        total=total,
        options=options,
    )


def _magcache(total: int, threshold: float) -> Peer:
    options = {"threshold": threshold, "calibrated": True}
    name = f"magcache-{threshold:g}-calibrated"
    return Peer(name, package="diffusers", kind="MagCache", total=total, options=options)


def _cache_dit(name: str, total: int, steps: tuple[int, ...], **options: Any) -> Peer:
    """Its forecasts at our computed steps: no threshold decides."""
    fixed = {
        "Fn_compute_blocks": 1,
        "Bn_compute_blocks": 0,
        "residual_diff_threshold": 9,
        "max_warmup_steps": 0,
    }
    return Peer(
        name, package="cache_dit", kind="cache-dit", total=total, options={**fixed, "steps": steps, **options}
    )
