"""accel's forecast and correction inside cache-dit: one line for servers that are built on it.

    with make_up(pipe) as calibrator:
        cache_dit.enable_cache(pipe, cache_config=DBCacheConfig(...), calibrator_config=calibrator)
        pipe("a photo of three stars")

cache-dit forecasts what its skipped blocks would have added, with a calibrator. `Forecast` is one: a line along the log
signal-to-noise ratio, of which a part is believed (`trend`), in place of one along step numbers. A calibrator never sees
the model's output, where what forecasts missed can be made up for, so `make_up` also stands behind the model: under schedulers
that take Euler steps, the next computed output carries the debt of those that were cached (accel.methods.forecasting.correction).

Run it (`python examples/cache_dit_calibrator.py`): the built-in model, the same computed steps with cache-dit's TaylorSeer, with
this forecast, and with the correction as well, by their distance to the plain picture.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cache_dit
import torch
from cache_dit.caching.cache_contexts import cache_context
from cache_dit.caching.cache_contexts.calibrators import CalibratorBase, CalibratorConfig
from torch import Tensor

from accel.core.clock import Clock, Listener
from accel.core.history import History
from accel.core.prediction import prediction_of, put
from accel.methods.forecasting.correction import Correction


@dataclasses.dataclass
class ForecastCalibratorConfig(CalibratorConfig):
    """What `cache_dit.enable_cache(..., calibrator_config=...)` takes; `make_up` gives one."""

    enable_calibrator: bool = True
    enable_encoder_calibrator: bool = True
    calibrator_type: str = "accel"
    make: Callable[[], Forecast] | None = None

    def strify(self, **kwargs: Any) -> str:
        return "accel"


class Forecast(CalibratorBase):
    """The last two values of each named tensor, continued to the scheduler's next time.

    Args:
        loop: whose clock says when a value was computed, and which is told that one was.
        trend: share of the extrapolated change that is believed.
    """

    def __init__(self, loop: Loop, trend: float) -> None:
        self.loop, self.trend = loop, trend
        self.histories: dict[str, History] = {}

    def reset_cache(self, *args: Any, **kwargs: Any) -> None:
        self.histories.clear()

    def mark_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """The clock counts."""

    def update(self, Y: Tensor, name: str = "default") -> None:
        self.loop.computed = True
        history, value = self.histories.get(name), Y.detach().clone()
        if history is None or history.values[0][0].shape != Y.shape:
            history = self.histories[name] = History(1, trend=self.trend)
            history.start([value], self.loop.time)
        else:
            history.add([value], self.loop.time)

    def approximate(self, name: str = "default") -> Tensor:
        (forecast,) = self.histories[name].forecasts(self.loop.time)
        return forecast

    def __repr__(self) -> str:
        return f"accel(trend={self.trend})"


class Loop(Listener):
    """Follows the pipeline's loop, and makes up at computed outputs for what cached ones missed.

    Attributes:
        computed: a calibrator has got a computed value in this call of the model.
        correct: what was missed is made up for.
    """

    def __init__(self, clock: Clock, correct: bool) -> None:
        self.clock, self.correct = clock, correct
        self.begin(clock)

    @property
    def time(self) -> float:
        return self.clock.times[self.clock.step]

    def begin(self, clock: Clock) -> None:
        self.computed, self.call = False, 0
        self.debts: list[Correction] = []  # of each call of a step
        self.latest: list[tuple[Tensor, float]] = []

    def before(self, clock: Clock) -> None:
        self.call = 0

    def leaves(self, module: Any, args: Any, output: Any) -> Any:
        """The model's output: what the pipeline gets."""
        computed, call, self.computed, self.call = self.computed, self.call, False, self.call + 1
        if not (self.correct and self.clock.running and self.clock.lengths):
            return output
        prediction, length = prediction_of(output), self.clock.lengths[self.clock.step]
        if call == len(self.debts):
            self.debts.append(Correction())
            self.latest.append((prediction, self.time))
        debt, (latest, then) = self.debts[call], self.latest[call]
        if not computed:
            debt.add([prediction], [latest], self.time - then, length)
            return output
        self.latest[call] = (prediction, self.time)
        if debt.due:
            debt.prepare(self.time - then, length)
        corrected = debt.apply(0, prediction, latest) if debt.due else prediction
        debt.forget()
        return put(output, corrected)


@contextmanager
def make_up(pipe: Any, trend: float = 0.75, correct: bool = True) -> Iterator[ForecastCalibratorConfig]:
    """A calibrator's configuration for this pipeline, and the correction behind its transformer, until the end."""
    loop = Loop(Clock.of(pipe.scheduler), correct)
    leave = loop.clock.add(loop, pipe)
    hook = pipe.transformer.register_forward_hook(loop.leaves)
    factory = cache_context.Calibrator

    def ours(config: CalibratorConfig) -> CalibratorBase:
        made: Any = config
        return made.make() if config.calibrator_type == "accel" else factory(config)

    cache_context.Calibrator = ours  # it has a list of its own kinds and no way to add one
    try:
        yield ForecastCalibratorConfig(make=lambda: Forecast(loop, trend))
    finally:
        cache_context.Calibrator = factory
        hook.remove()
        leave()


def main() -> None:
    from accel.core.schedule import growing
    from accel.evaluation.bench.peers import copied
    from accel.evaluation.metrics.pixel import psnr
    from accel.generation import load_pipeline

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--prompt", nargs="*", default=["a photo of a red circle left of a blue square"])
    args = parser.parse_args()
    pipe = load_pipeline("builtin", dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    computed = growing(args.steps, 0.42, 0.5)

    def pictures() -> Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(len(args.prompt))]
        call = {"num_inference_steps": args.steps, "height": args.size, "width": args.size}
        return pipe(list(args.prompt), generator=generators, output_type="pt", **call).images

    def cached(calibrator: Any) -> Tensor:
        config = cache_dit.DBCacheConfig(
            num_inference_steps=args.steps,
            enable_separate_cfg=True,
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=0,
            residual_diff_threshold=9,  # the mask decides
            steps_computation_mask=[int(step in computed) for step in range(args.steps)],
        )
        # It knows pipelines by class name; the built-in one is a subclass of FluxPipeline.
        wrapped = type(pipe).__mro__[1](**pipe.components)
        cache_dit.enable_cache(wrapped, cache_config=config, calibrator_config=calibrator)
        return pictures()

    plain = pictures()
    for name, options in (
        ("cache-dit's TaylorSeer", None),
        ("accel's forecast", False),
        ("and its correction", True),
    ):
        with copied(pipe):
            if options is None:
                made = cached(cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1))
            else:
                with make_up(pipe, correct=options) as calibrator:
                    made = cached(calibrator)
        print(f"{name}: {psnr(made, plain).mean():.1f} dB, {len(computed)} of {args.steps} steps computed")


if __name__ == "__main__":
    main()
