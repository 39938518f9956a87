"""One method at work on one denoiser: what is common to all methods that follow a denoising loop.

The rule that keeps torch.compile happy and the device busy: hooks on the denoiser's parts, which may be traced, only
read plain flags and store tensors. Everything that counts, decides or reads a value happens in the clock's callbacks,
between two steps, or at the gate around the denoiser (`accel.core.gate`).
"""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from accel.errors import AccelWarning, UnsupportedError
from accel.stats import Stats, StepStats

from . import caller, samplers
from .capability import Adapter, denoisers_of, scheduler_of
from .clock import Clock, Listener
from .compiling import Compilation
from .copies import copies_plain
from .gate import Gate
from .graphs import Held
from .method import Method
from .prediction import like, prediction_of, put, shapes_of, tensors_of
from .schedule import Phase, Schedule
from .target import Target


class StepMethod(Method):
    """A method that follows a denoising loop step by step. Called between steps, never inside the denoiser.

    Attributes:
        reduces: it leaves tokens out whatever the schedule's budgets say.
    """

    reduces = False

    run: Run

    def compile(self, how: bool | str, stack: ExitStack) -> None:
        self.run.compile(how, stack)

    @property
    def compiled(self) -> str:
        return "" if self.run.compilation is None else self.run.compilation.state

    @classmethod
    def take_apart(cls, pipe: Any, find: Callable[[nn.Module], Adapter]) -> Target:
        (_, denoiser), *beside = denoisers_of(pipe)
        adapter, scheduler = find(denoiser), scheduler_of(pipe)
        adapter.check(denoiser)
        if not hasattr(scheduler, "step"):
            raise UnsupportedError(
                f"{type(scheduler).__name__} has no step: a predictor and a corrector call the denoiser several times at "
                f"each noise level. {samplers.OTHER}"
            )
        return Target(weakref.ref(pipe), denoiser, tuple(m for _, m in beside), adapter, scheduler)

    @abstractmethod
    def forget(self) -> None:
        """Drop all state: a run starts, has ended or has failed."""

    @abstractmethod
    def prepare(self, run: Run) -> None:
        """The step `run.phase` describes is about to start."""

    def stepping(self, run: Run) -> None:
        """The scheduler is about to step with `run.clock.model_output`, which may be replaced."""

    @abstractmethod
    def account(self, run: Run) -> StepStats:
        """After a step: what it did (the calls are counted by the run)."""

    def check_grid(self, grid: tuple[int, int]) -> None:
        """The token grid has become known.

        Raises:
            UnsupportedError: the settings do not go with it.
        """

    def calls_changed(self, run: Run) -> None:
        """The calls of the running step have other shapes, or are others, than before: guidance came or went.

        Raises:
            UnsupportedError: the method cannot do with it.
        """

    def entering(self, run: Run) -> None:
        """A call of the step is about to run the module."""

    def leaving(self, run: Run) -> None:
        """It has come out; not told of one that failed, after which the loop ends."""

    def held(self, run: Run) -> Held:
        """What its hooks read and write in the call that is about to run, which may be recorded as a CUDA graph."""
        return Held()

    def keep(self, run: Run) -> None:
        """A call is over that ran as a CUDA graph: clone what it made and a later step reads."""

    def noisy(self, run: Run, reason: str) -> None:
        """The sampler turned out to add noise, for the reason given.

        Raises:
            UnsupportedError: unless the method can do with it.
        """
        raise UnsupportedError(samplers.noise_message(run.target.scheduler, reason))


class Run(Listener):
    """Follows the clock for one method and keeps what a method needs to know about the loop.

    Attributes:
        active: the running call of the denoiser is this loop's. Read by hooks, possibly traced.
        phase: what the running step does; dense while no loop is running.
        grid: (rows, columns) of the image tokens, known from the first call of a run; None before.
        references: tokens of reference images that follow those, known with it.
        phases: the phases of all steps of this run.
        time: of the running step, as forecasts count it (see `Clock.times`).
        outputs: the predictions of this step's calls as the pipeline got them, kept if the method asked for
            them (`keep_outputs`). Their number is the index of the running call.
        correct: set by the method between steps: prediction -> the prediction that the pipeline gets.
        detour: set by the method between steps: see `divert`.
        samples: images per step, known after the first step; None before.
        branch_skipped: at this step, one of the two branches of guidance was not computed.
        changed: calls of this step have other shapes, or are others, than those of the last computed step: what was
            learnt from that one is not about these.
        seen: calls of this step so far.
        compilation: what runs the denoiser's calls compiled, or as CUDA graphs; None: they run as they are.
    """

    def __init__(
        self, target: Target, schedule: Schedule, method: StepMethod, stats: Stats, *, span: bool
    ) -> None:
        self.target, self.schedule, self.method, self.stats, self.span = target, schedule, method, stats, span
        self.keep_outputs = False
        self.clock = Clock.of(target.scheduler)
        self._names = list(inspect.signature(type(target.denoiser).forward).parameters)[1:]
        self._gates: list[Gate] = []
        self.compilation: Compilation | None = None
        self.device = torch.device("cpu")  # of the last call
        self._form: Callable[[Tensor], Any] | None = None
        self.active = False
        self._thread = 0
        self.prepared = -1  # the step that was prepared last
        self.phase: Phase
        self.phases: tuple[Phase, ...]
        self.time: float
        self.answers: Sequence[Tensor] | None
        self.detour: Callable[..., Any] | None
        self.correct: Callable[[Tensor], Tensor] | None
        self.grid: tuple[int, int] | None
        self.references: int
        self.samples: int | None
        self.branch_skipped: bool
        self.changed: bool
        self.outputs: tuple[Tensor, ...]
        self._shapes: list[tuple]  # of the calls of the last computed step, and of what they made
        self._shapes_now: list[tuple]
        self._made: list[torch.Size]
        self._made_now: list[torch.Size]
        self._idle()

    def attach(self, stack: ExitStack) -> None:
        for module in self.target.modules:
            stack.callback(module.register_forward_pre_hook(self._inside, with_kwargs=True).remove)
            copies_plain(module, stack)
        self._open()
        stack.callback(self._close)
        stack.callback(self.clock.add(self, self.target.pipe()))
        stack.callback(self._drop)

    def compile(self, how: bool | str, stack: ExitStack) -> None:
        """See `accel.accelerate`."""
        pipe = self.target.pipe  # weak

        def quiet() -> bool:
            return bool(getattr(pipe(), "_progress_bar_config", {}).get("disable"))

        self.compilation = Compilation(how, self.target.modules, quiet)
        self.compilation.attach(stack)

    def _open(self) -> None:
        """Gates around what the pipeline calls now; again when a loop starts, since it may have been compiled."""
        gates = [Gate.of(outer) for outer in self.target.outers]
        if gates != self._gates:
            self._close()
            self._gates = gates
        for gate in gates:
            gate.open(self)

    def _close(self) -> None:
        for gate in self._gates:
            gate.close(self)
        self._gates = []

    # The clock's side: between steps.

    def begin(self, clock: Clock) -> None:
        self._drop()
        if not self._is_ours():
            self._foreign = True
            return
        self.stats.notes.clear()
        self.phases = self.schedule.phases(clock.total)
        self._partial = self.method.reduces or any(0 < phase.budget < 1 for phase in self.phases)
        if self._partial and getattr(self.target.denoiser, "is_cache_enabled", False):
            raise UnsupportedError(
                "one of diffusers' caches is enabled on the denoiser: it keeps what blocks put out, for another number "
                "of tokens than they get now. Call pipe.transformer.disable_cache(), or use forecasts "
                "(the presets quality, balanced, fast and draft), which go with it."
            )
        if (
            self.schedule.reduces
            and not self.method.reduces
            and all(phase.dense and phase.guided for phase in self.phases)
        ):
            warnings.warn(
                f"all {clock.total} steps are dense: the schedule leaves none to reduce, "
                "so this run is not accelerated. For models of 4 to 8 steps: the preset few-step.",
                AccelWarning,
                stacklevel=2,
            )
        if self.compilation is not None:
            self.compilation.begin()
        self._open()

    def _is_ours(self) -> bool:
        """Whether the loop that starts calls the denoiser: other pipelines may share the scheduler.

        Raises:
            UnsupportedError: the accelerated pipeline itself now has another denoiser.
        """
        pipe = None if self.clock.pipe is None else self.clock.pipe()
        if pipe is None:
            return True
        try:
            inner = [denoiser for _, denoiser in denoisers_of(pipe)]
        except UnsupportedError:  # of a kind of its own; its calls will tell
            return True
        if any(denoiser is self.target.denoiser for denoiser in inner):
            return True
        if pipe is self.target.pipe():
            raise UnsupportedError(
                "the pipeline's denoiser was replaced after accelerate(). Call handle.remove() and accelerate the "
                "pipeline again."
            )
        return False

    def before(self, clock: Clock) -> None:
        if self._foreign:
            return
        self.phase, self.time = self.phases[clock.step], clock.times[clock.step]
        self.samples = clock.samples
        self.branch_skipped = self.changed = False
        self.answers = self.detour = None
        self.prepared = clock.step
        self.method.prepare(self)
        self.outputs = ()
        self._calls, self.seen, self._shapes_now, self._made_now = 0, 0, [], []

    def check_calls(self, calls: int, expected: int) -> None:
        """Refuse a step that calls the denoiser another number of times than the steps before it, where it is not
        known which branches of guidance the calls are: a forecast would continue another branch."""
        if calls == expected:
            return
        if self.target.adapter.branches.calls is not None:
            self._change()
            return
        raise UnsupportedError(
            f"the model was called {calls} times at step {self.clock.step}, but {expected} times at the steps "
            "before it (guidance over a part of the steps, or a scheduler that calls it a varying number "
            "of times), and which of them are left is not known of "
            f"{type(self.target.denoiser).__name__}. Forecasts need the same number at every step."
        )

    def _change(self) -> None:
        """The calls of this step are others than those of the steps before."""
        self.changed = True
        self.method.calls_changed(self)

    def check_sampler(self) -> None:
        """Refuse a sampler that cannot be forecast under (see `accel.core.samplers`).

        Raises:
            UnsupportedError: it adds noise, or does not go from one time to the next with one call at each.
        """
        clock, name = self.clock, type(self.target.scheduler).__name__
        reason = samplers.unsteady(self.target.scheduler, clock.times, clock.timesteps)
        if reason is not None:
            raise UnsupportedError(
                f"{name} {reason}. {samplers.OTHER} Forecasts need one call of the model at each time."
            )
        if clock.noise is not None:
            self.method.noisy(self, clock.noise)

    def answer(self, predictions: Sequence[Tensor]) -> None:
        """Do not run the denoiser at the step that is about to start, but give these `predictions` to its
        calls."""
        self._refuse_second()
        self.answers = predictions

    def divert(self, detour: Callable[..., Any]) -> None:
        """Calls of the step that is about to start run `detour(call, args, kwargs)`. `call` is what would have run:
        the detour may call it or not, with other arguments, and return something else."""
        self._refuse_second()
        self.detour = detour

    def _refuse_second(self) -> None:
        prepared = [run for run in self.alongside() if run.prepared == self.clock.step]
        if any(run.answers is not None or run.detour is not None for run in prepared):
            raise UnsupportedError(
                f"two methods forecast step {self.clock.step} of the same model. Put both into one schedule: "
                "TokenPruningConfig takes forecast steps (0 in cycle=...), partial steps and guidance_every."
            )

    def alongside(self) -> list[Run]:
        """The runs on the same denoiser and loop, this one among them."""
        runs = [run for run in self.clock.listeners if isinstance(run, Run)]
        return [run for run in runs if run.target.denoiser is self.target.denoiser]

    def stepping(self, clock: Clock) -> None:
        if self.seen:
            self.method.stepping(self)

    def after(self, clock: Clock) -> None:
        if self._foreign:
            return
        if self.seen == 0:
            self._not_called()
            return
        if clock.step == 0:  # not in `begin`, which image-to-image brings about twice
            self.stats.runs += 1
            self.stats.steps.clear()
            self._check_references(clock)
        if clock.noise is not None:
            self.method.noisy(self, clock.noise)
        done = replace(self.method.account(self), calls=self._calls)
        if any(run.answers is not None and not run.computed_instead for run in self.alongside()):
            done = replace(done, computed=0, built=0, reused=0, forecast=done.total)
        elif self.branch_skipped:
            saved = done.computed - done.computed // 2
            done = replace(
                done, computed=done.computed - saved, forecast=done.forecast + saved, branch_skipped=True
            )
        if self.computed:
            self._shapes, self._made = self._shapes_now, self._made_now
        self.stats.record(done)
        if clock.step == clock.total - 1 and self.device.type == "cuda":
            self.stats.peak_bytes = torch.cuda.max_memory_allocated(self.device)
        if self.compilation is not None:
            self.stats.notes += [note for note in self.compilation.notes if note not in self.stats.notes]

    @property
    def computed_instead(self) -> bool:
        """This step was to be answered, but its calls were others than the ones that can be: they were computed."""
        return self.answers is not None and self.changed

    @property
    def computed(self) -> bool:
        """The denoiser ran at this step."""
        return self.answers is None or self.changed

    def _not_called(self) -> None:
        """A loop that does not call the denoiser at its first step is not ours; silently so if it is another
        pipeline's. One that calls it in another way later on (from another thread, or another function) is not any
        more."""
        pipe = None if self.clock.pipe is None else self.clock.pipe()
        if self.clock.step or pipe is None or pipe is self.target.pipe():
            warnings.warn(
                f"step {self.clock.step} of a loop of {self.clock.total} did not call the accelerated "
                f"{type(self.target.denoiser).__name__} from where its first step does (a copy, another wrapper of "
                "torch.compile, another thread or function): from here on it is not accelerated.",
                AccelWarning,
                stacklevel=2,
            )
        self._drop()
        self._foreign = True

    def shortened(self, clock: Clock) -> None:
        if not self._foreign:
            self.phases, self.time = self.schedule.phases(clock.total), clock.times[0]

    def end(self, clock: Clock) -> None:
        self._drop()
        if self.compilation is not None:
            self.compilation.end()

    def _drop(self) -> None:
        self._idle()
        self.method.forget()

    def _idle(self) -> None:
        self.phase, self.phases, self.time, self._partial = Phase(1.0), (), 0.0, False
        self.answers = self.correct = self.detour = None
        self.grid = self.samples = None
        self.references = 0
        self.branch_skipped = self.changed = self._foreign = self._gridless = False
        self.outputs = ()
        self._calls = self.seen = 0
        self._shapes, self._shapes_now, self._made, self._made_now = [], [], [], []

    # The denoiser's side, at its gate: eager, around the call of the module.

    def serves(self) -> bool:
        """Whether the running call is this loop's. Asked by hooks, possibly traced: compiled code runs behind the gate
        alone, eager code may be another thread's that goes by a module nobody told us of."""
        return self.active and (torch.compiler.is_compiling() or threading.get_ident() == self._thread)

    @property
    def image_tokens(self) -> int | None:
        """N, and the references behind them; None: not known yet."""
        return None if self.grid is None else self.grid[0] * self.grid[1] + self.references

    @property
    def tokens(self) -> int:
        """Image tokens of a plain step, over all blocks; 2 where they are not described, or no block takes any, so that
        steps, and halves of them, are counted."""
        return (self.grid and self.target.tokens(self.grid, self.references)) or 2

    def arrives(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """One of this loop's calls has come."""
        self._thread = threading.get_ident()
        shapes = shapes_of(args, kwargs)
        known = self._shapes[self.seen : self.seen + 1]
        if known not in ([], [shapes]):
            self._change()
        self._shapes_now.append(shapes)
        self.seen += 1

    def enters(self, args: tuple, kwargs: dict[str, Any], *, traced: bool) -> None:
        """It is about to go into the module, whose hooks are `traced` along if it is compiled."""
        if traced:
            self._read(args, kwargs)
        self.method.entering(self)
        self.device = next((t.device for t in tensors_of((*args, *kwargs.values()))), torch.device("cpu"))
        self.stats.call_starts(self.device)

    def _read(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """The arguments: what cannot be followed, and at the first call the grid."""
        tokens = self.target.adapter.tokens
        if tokens is None:
            return
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if self._partial:  # at the first step, not after minutes of dense ones
            tokens.refuse(arguments, self.span)
        if self.grid is None and not self._gridless:
            try:
                source = tokens.grid_source(arguments)
                self.grid = tokens.grid(self.target.denoiser, source)
                self.references = tokens.references(self.target.denoiser, source)
                self.method.check_grid(self.grid)
            except UnsupportedError:
                if self._partial:
                    raise
                self._lose_grid()

    def _lose_grid(self) -> None:
        """Forecasts need none."""
        self.grid, self.references, self._gridless = None, 0, True

    def _check_references(self, clock: Clock) -> None:
        """
        Raises:
            UnsupportedError: what is predicted for the images behind the first is not thrown away.
        """
        made = clock.model_output
        if self.grid is None or not self.references or not isinstance(made, Tensor):
            return
        if made.ndim == 3 and made.shape[1] > self.grid[0] * self.grid[1]:
            if self._partial:
                raise UnsupportedError(
                    f"the {made.shape[1]} image tokens are several grids, all of which are made (layers, or a picture "
                    "of pictures); token reduction needs one. Use forecasts (preset 'balanced')."
                )
            self._lose_grid()

    def held(self) -> Held:
        """What hooks read and write in the call that is about to run."""
        held = self.method.held(self)
        return held._replace(key=(id(self), self.grid, self.references, self.phase.budget, *held.key))

    @property
    def kinds(self) -> int:
        """How many kinds of calls of the denoiser this run makes, at least."""
        return len({phase.budget for phase in self.phases if phase.budget > 0})

    def answer_now(self) -> Tensor | None:
        """The forecast for this call; None: compute it."""
        if self.answers is None or self.changed:
            return None
        call = self.seen - 1
        if call >= len(self.answers):
            self.check_calls(call + 1, len(self.answers))
            return None
        return self.answers[call]

    def leaves(self, output: Any) -> Any:
        """It came out with this; what the pipeline gets."""
        prediction = prediction_of(output)
        self._form = like(output)
        if self.computed:
            # Qwen-Image 2.1 predicts the whole sequence at the first step and the image alone after it.
            shape = prediction.shape[1:]  # half of a batch is the same
            if self._made[self._calls : self._calls + 1] not in ([], [shape]):
                self._change()
            self._made_now.append(shape)
        self.method.leaving(self)
        if self.answers is None and any(gate.overwrites for gate in self._gates):
            self.method.keep(self)
            prediction = prediction.clone()
            output = put(output, prediction)  # guidance in two calls keeps the first one's, too
        if self.correct is not None and not self.changed:
            prediction = self.correct(prediction)
            output = put(output, prediction)
        if self.keep_outputs:
            self.outputs = (*self.outputs, prediction)
        self._calls += 1
        self.stats.call_ends(prediction.device)
        return output

    def like_output(self, prediction: Tensor) -> Any:
        """The prediction in what the denoiser's calls return."""
        assert self._form is not None
        return self._form(prediction)

    def _inside(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Among the denoiser's hooks: other people's may have changed the arguments. Where that is traced, what came
        to the gate has to do."""
        if torch.compiler.is_compiling():
            return
        if self.active:
            self._read(args, kwargs)
        if self.clock.running:
            return
        pipe, who = self.target.pipe(), caller.pipeline()
        if pipe is not None and who in (None, pipe) and not self.clock.follows(scheduler_of(pipe)):
            raise UnsupportedError(
                "the pipeline's scheduler was replaced after accelerate(), so its steps cannot be followed. "
                "Call handle.remove() (or accelerate(..., replace=True)) after setting the scheduler."
            )
        why = "no scheduler.set_timesteps before it, or all steps done"
        if who is not None and who is not pipe:
            why = f"by another {type(who).__name__}, whose scheduler is not followed: accelerate that one too"
        warnings.warn(
            f"the denoiser was called outside of a denoising loop ({why}): it computes all tokens.",
            AccelWarning,
            stacklevel=2,
        )
