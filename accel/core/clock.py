"""Where the denoising loop is, without asking the device.

diffusers' schedulers all have `set_timesteps` and `step`; not all have `step_index`. Both are wrapped on the
scheduler *instance*, and `set_begin_index` where there is one (image-to-image starts in the middle).
All of this runs outside of compiled code: it is the one place where steps are counted.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from accel.errors import UnsupportedError

from . import caller, samplers
from .noise_levels import log_snr, step_lengths


class Listener:
    """What follows a clock. `begin`, then for every step `before`, `stepping` and `after`, then `end`.

    `end` also comes when the loop fails inside the scheduler or the denoiser, or a pipeline leaves it early. `begin`
    may come again without it (a loop of the user's own, left early): state is dropped at either.
    """

    def begin(self, clock: Clock) -> None: ...

    def before(self, clock: Clock) -> None: ...

    def stepping(self, clock: Clock) -> None:
        """The scheduler is about to step: what is put into `clock.model_output` it takes for the model's."""

    def after(self, clock: Clock) -> None: ...

    def shortened(self, clock: Clock) -> None:
        """At the end of its first step it shows that the loop has started in the middle."""

    def end(self, clock: Clock) -> None: ...


class Clock:
    """Counts the steps of one scheduler and tells its listeners.

    Attributes:
        step: index of the step that is running, from 0 also when the loop starts in the middle.
        total: number of steps of this run.
        timesteps: the scheduler's timesteps of this run, on the host.
        times: what forecasts run along, rising: the steps' log signal-to-noise ratio (accel.core.noise_levels).
        lengths: what each step multiplies the prediction with before it adds it to the sample; None: unknown.
        running: a loop has been started and has not ended.
        runs: how many loops have been started.
        samples: batch of the latents seen by the last `step`, None before the first. The denoiser's batch is
            a multiple of it when guidance is batched.
        model_output, sample: what the last `step` was given as the model's, and as the latents; None before the first.
        noise: why the running loop's sampler adds noise, a clause for messages; None: not seen to.
        pipe: the pipeline that runs the loop, weakly; None for a loop of the user's own.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = weakref.ref(scheduler)
        self._listeners: list[Listener] = []
        self._bars: list[tuple[weakref.ref, dict[str, Any]]] = []  # pipelines, and their own progress_bar
        self._whole = 0  # timesteps of the schedule, of which a run may skip the first
        self.step = self.total = self.runs = 0
        self.timesteps: tuple[float, ...] = ()
        self.times: tuple[float, ...] = ()
        self.lengths: tuple[float, ...] | None = None
        self.running = False
        self.samples: int | None = None
        self.model_output: Any = None
        self.sample: Any = None
        self.noise: str | None = None
        self.pipe: weakref.ref | None = None
        self._place: caller.Place | None = None
        self._paths: set[caller.Path] = set()  # by which the loop's first step called its denoisers
        self._step_names: list[str] = []
        self._step_defaults: dict[str, Any] = {}
        self._dice: samplers.Dice | None = None

    @classmethod
    def of(cls, scheduler: Any) -> Clock:
        """The clock of this scheduler; one for all methods, so that they can leave in any order."""
        # Found through its own wrapper: a table of clocks would keep pipelines alive that nobody uses.
        return getattr(vars(scheduler).get("step"), "accel_clock", None) or cls(scheduler)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Reached only through the scheduler's own dictionary, since copies of the scheduler are plain.

        Raises:
            UnsupportedError: always. Whoever copies that (MultiDiffusion's panorama) steps once for each view.
        """
        raise UnsupportedError(
            "the pipeline copies the state of its scheduler, to take several steps at each time (a step for each view "
            "of a panorama): such a loop cannot be followed. Run it without acceleration."
        )

    def follows(self, scheduler: Any) -> bool:
        return self._scheduler() is scheduler

    @property
    def listeners(self) -> tuple[Listener, ...]:
        return tuple(self._listeners)

    def add(self, listener: Listener, pipe: Any = None) -> Callable[[], None]:
        """Tell `listener` from now on; returns the undo action. The first wraps the scheduler, the last
        unwraps it. With the pipeline that runs the loop, it is also known when that leaves it before the last
        step: interrupted, or by an exception in a callback."""
        if not self._listeners:
            self._wrap()
        if pipe is not None:
            self._watch(pipe)
        self._listeners.append(listener)
        return functools.partial(self._leave, listener)

    def calls(self, place: caller.Place, path: caller.Path) -> bool:
        """Whether a call made there is the running loop's: in its thread, by its pipeline and no other that is
        nested in it, and through the functions by which its first step called."""
        if not self.running or place != self._place:
            return False
        if self.step == 0:
            self._paths.add(path)
        return path in self._paths

    def abort(self) -> None:
        """The loop failed: listeners drop their state."""
        if self.running:
            self._stop()

    def _stop(self) -> None:
        self.running, self.model_output, self.sample, self._dice = False, None, None, None
        self._tell("end")

    def _leave(self, listener: Listener) -> None:
        self._listeners.remove(listener)
        if not self._listeners:
            self._unwrap()

    def _tell(self, event: str) -> None:
        for listener in tuple(self._listeners):
            getattr(listener, event)(self)

    def _wrap(self) -> None:
        scheduler = self._scheduler()
        assert scheduler is not None
        self._own = {name: vars(scheduler)[name] for name in _WRAPPED if name in vars(scheduler)}
        for name, handler in _HANDLERS.items():
            if hasattr(scheduler, name):
                setattr(scheduler, name, _wrapped(self, getattr(scheduler, name), handler))
        signature = inspect.signature(type(scheduler).step)
        self._step_names = list(signature.parameters)[1:]
        self._step_defaults = {
            name: p.default for name, p in signature.parameters.items() if p.default is not p.empty
        }
        # What copy, deepcopy and pickle ask for: a copy with these wrappers would drive this scheduler.
        vars(scheduler)["__getstate__"] = self._plain_state

    def _watch(self, pipe: Any) -> None:
        own = {name: value for name, value in vars(pipe).items() if name == "progress_bar"}
        if (
            hasattr(pipe, "progress_bar")
            and getattr(own.get("progress_bar"), "accel_clock", None) is not self
        ):
            self._bars.append((weakref.ref(pipe), own))
            pipe.progress_bar = _Watched(self, pipe.progress_bar)

    def _unwrap(self) -> None:
        for reference, own in self._bars:
            pipe = reference()
            if pipe is not None and getattr(vars(pipe).get("progress_bar"), "accel_clock", None) is self:
                del vars(pipe)["progress_bar"]
                vars(pipe).update(own)
        self._bars.clear()
        scheduler = self._scheduler()
        if scheduler is None:
            return
        del vars(scheduler)["__getstate__"]
        for name in _HANDLERS:  # what the user has put there since stays
            if getattr(vars(scheduler).get(name), "accel_clock", None) is self:
                del vars(scheduler)[name]
                vars(scheduler).update({name: self._own[name]} if name in self._own else {})

    def _plain_state(self) -> dict[str, Any]:
        """The scheduler's attributes without anything of ours."""
        attributes = vars(self._scheduler())
        return {name: value for name, value in attributes.items() if name not in _WRAPPED} | self._own

    def _on_set_timesteps(self, result: Any, *args: Any, **kwargs: Any) -> None:
        scheduler = self._scheduler()
        assert scheduler is not None
        # Of some, the last timestep is where the loop ends, and no step.
        self._whole = len(scheduler.timesteps) - (
            samplers.known_name(scheduler) in samplers.ENDS_WITH_A_TIMESTEP
        )
        self._start(self._whole)

    def _on_set_begin_index(self, result: Any, begin_index: int = 0, *args: Any, **kwargs: Any) -> None:
        # Pipelines call it between set_timesteps and the first denoising call, mostly with 0.
        if self.running and self.step == 0 and self.total != self._whole - begin_index:
            self._start(self._whole - begin_index)

    def _steps_here(self) -> bool:
        """Whether a step is the running loop's: of a run we saw the start of, in the same thread and pipeline. Two that
        use one scheduler at once are told apart; the one that started last is followed."""
        return self.running and caller.here()[0] == self._place

    def before_step(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The scheduler is about to step; the arguments it gets. What adds noise by its class or its settings is known
        by now; what does by the arguments, or is nobody's we know, shows here."""
        if not self._steps_here():
            return args, kwargs
        scheduler = self._scheduler()
        given = {**self._step_defaults, **dict(zip(self._step_names, args, strict=False)), **kwargs}
        sample = self.sample = given.get("sample")
        self.samples = sample.shape[0] if isinstance(sample, Tensor) else None
        self.model_output = given.get("model_output")
        self.noise = self.noise or samplers.adds_noise(scheduler, given)
        if self.step == 0 and not hasattr(scheduler, "set_begin_index"):
            self._begins_at(given.get("timestep"))
        self._dice = None
        if not samplers.is_known(scheduler) and isinstance(sample, Tensor):
            self._dice = samplers.Dice(given.get("generator"), sample.device)
        self._tell("stepping")
        if self.model_output is not given.get("model_output"):
            given = dict(zip(self._step_names, args, strict=False))
            return (), {**given, **kwargs, "model_output": self.model_output}
        return args, kwargs

    def _begins_at(self, timestep: Any) -> None:
        """The first step of a loop that may start in the middle (image-to-image): only some schedulers are told by
        `set_begin_index`, the others' steps show it. Waits for the device once a run."""
        if timestep is None:
            return
        now = float(
            timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep
        )  # Wuerstchen: one an image
        first = next((i for i, t in enumerate(self.timesteps) if t == now), 0)
        if first:
            self.total -= first
            self.timesteps, self.times = self.timesteps[first:], self.times[first:]
            self.lengths = None if self.lengths is None else self.lengths[first:]
            self._tell("shortened")

    def _on_step(self, result: Any, *args: Any, **kwargs: Any) -> None:
        if not self._steps_here():
            return
        if self._dice is not None and self._dice.fell:
            self.noise = self.noise or "drew random numbers in its step"
        self._tell("after")
        self.step += 1
        if self.step < self.total:
            self._tell("before")
        else:
            self._stop()

    def _start(self, total: int) -> None:
        scheduler = self._scheduler()
        assert scheduler is not None
        # Read once per run, before the loop: no step waits for the device.
        first = self._whole - total
        self.timesteps = tuple(float(t) for t in scheduler.timesteps[first:].tolist())
        self.times = log_snr(scheduler)[first:]
        lengths = step_lengths(scheduler)
        self.lengths = None if lengths is None else lengths[first:]
        self.step, self.total, self.samples = 0, total, None
        self.model_output = self.sample = self._dice = None
        self.noise = samplers.adds_noise(scheduler)
        self._place, self._paths = caller.here()[0], set()
        pipe = caller.pipeline()
        self.pipe = None if pipe is None else weakref.ref(pipe)
        if pipe is not None:  # maybe another one that shares the scheduler
            self._watch(pipe)
        self.runs += 1
        self.running = (
            True  # last: until here a bar of the loop before may close, and end what it takes for its own
        )
        self._tell("begin")
        self._tell("before")


_HANDLERS: dict[str, Callable[..., None]] = {
    "set_timesteps": Clock._on_set_timesteps,
    "set_begin_index": Clock._on_set_begin_index,
    "step": Clock._on_step,
}
_WRAPPED = (*_HANDLERS, "__getstate__")


def _wrapped(clock: Clock, method: Callable, handler: Callable[..., None]) -> Callable:
    # functools.wraps keeps the signature: diffusers inspects set_timesteps and step to see what they accept.
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            if handler is Clock._on_step:
                args, kwargs = clock.before_step(args, kwargs)
            result = method(*args, **kwargs)
            handler(clock, result, *args, **kwargs)
        except BaseException:
            clock.abort()
            raise
        return result

    call.accel_clock = clock  # type: ignore[attr-defined]
    return call


class _Watched:
    """`pipe.progress_bar`: diffusers' pipelines run their loop inside of it, and it closes however they leave."""

    def __init__(self, clock: Clock, method: Callable) -> None:
        functools.update_wrapper(self, method)
        self.accel_clock, self._method = clock, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bar = self._method(*args, **kwargs)
        clock, close, open_run = self.accel_clock, getattr(bar, "close", None), [self.accel_clock.runs]
        if close is None:  # a bar of the user's own
            return bar

        def closed() -> None:
            # Once: a bar closes again when it is collected, at any time and in any thread.
            if open_run and open_run.pop() == clock.runs:
                clock.abort()
            close()

        bar.close = closed
        return bar

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """In a copy of the pipeline: the copy's own, unwatched."""
        method: Any = self._method
        owner = getattr(method, "__self__", None)
        return method if owner is None else types.MethodType(method.__func__, memo.get(id(owner), owner))
