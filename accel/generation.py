"""Generating with any pipeline, plain and accelerated, from the same seeds: what the command line runs.

An image's noise depends on its seed alone, so it does not matter which batch it falls into.
"""

from __future__ import annotations

import copy
import importlib.metadata
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from . import configs
from .api import accelerate
from .core.capability import scheduler_of
from .core.checks import check, is_number, is_whole
from .core.decoding import Sampling
from .errors import AccelError, ConfigError, UnsupportedError
from .pipelines.loading import (
    BUILTIN,
    BUILTIN_AR,
    BUILTIN_TEXTURED,
    BUILTIN_TURBO,
    DTYPES,
    is_autoregressive,
    load_pipeline,
)
from .pipelines.timing import measure

__all__ = [
    "BUILTIN",
    "BUILTIN_AR",
    "BUILTIN_TEXTURED",
    "BUILTIN_TURBO",
    "DTYPES",
    "Decoding",
    "Generated",
    "Job",
    "Settings",
    "Way",
    "batches",
    "call_in_full",
    "check_can_accelerate",
    "default_steps",
    "guidance_argument",
    "is_autoregressive",
    "load_pipeline",
    "parse_size",
    "presets_for",
    "run",
    "size_multiple",
    "timed",
    "versions",
]

# Far beyond what is ever useful: they catch slips of the keyboard before memory or hours are gone.
MAX_STEPS, MAX_SIDE, MAX_GUIDANCE = 10_000, 16_384, 1_000

T = TypeVar("T")


def parse_size(text: str) -> tuple[int, int]:
    """ "512" or "768x512" (width x height) → (width, height)."""
    match = re.fullmatch(r"([0-9]{1,9})(?:[xX]([0-9]{1,9}))?", text.strip())
    if not match:
        raise ConfigError(
            f"size {text[:40]!r} is neither a number of pixels (512) nor WIDTHxHEIGHT (768x512)"
        )
    return int(match[1]), int(match[2] or match[1])


@dataclass(frozen=True)
class Job:
    """One image to make."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Settings:
    """How to call the pipeline; None leaves the pipeline's own default.

    Attributes:
        steps: denoising steps; not for autoregressive models.
        size: width, height in pixels.
        guidance: strength of classifier-free guidance.
        temperature, top_k, top_p: see `accel.core.decoding.Sampling`; for autoregressive models only.

    Raises:
        ConfigError: a value that no pipeline can take.
    """

    steps: int | None = None
    size: tuple[int, int] | None = None
    guidance: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.steps is not None:
            valid = is_whole(self.steps) and 1 <= self.steps <= MAX_STEPS
            check(valid, "steps", f"at least 1 and at most {MAX_STEPS}", self.steps)
        for side in self.size or ():
            valid = is_whole(side) and 1 <= side <= MAX_SIDE
            check(valid, "size", f"at least 1 and at most {MAX_SIDE} pixels a side", side)
        if self.guidance is not None:
            valid = is_number(self.guidance) and 0 <= self.guidance <= MAX_GUIDANCE
            check(valid, "guidance", f"a number from 0 to {MAX_GUIDANCE}", self.guidance)
        Sampling(**self._sampling)

    def check(self, pipe: Any) -> None:
        """Before any work.

        Raises:
            ConfigError: a value that this pipeline cannot take, or that models of its kind do not have.
            UnsupportedError: the pipeline makes no images.
        """
        if is_autoregressive(pipe):
            return self._check_autoregressive(pipe)
        if given := [f"--{name.replace('_', '-')}" for name in self._sampling]:
            raise ConfigError(
                f"{', '.join(given)} is for autoregressive models, which draw tokens; {type(pipe).__name__} "
                "is a diffusion model: it has --steps and --guidance"
            )
        self._check_size(pipe)
        for name in self.arguments(pipe):
            if not _accepts(pipe, name):
                option = next(option for option, names in _ARGUMENTS.items() if name in names)
                raise ConfigError(f"{type(pipe).__name__} takes no {name!r}; leave {option} out")
        return None

    def _check_size(self, pipe: Any) -> None:
        if self.size is None:
            return
        multiple = size_multiple(pipe)
        if any(side % multiple for side in self.size):
            width, height = (max(multiple, round(side / multiple) * multiple) for side in self.size)
            raise ConfigError(
                f"size {self.size[0]}x{self.size[1]} is not divisible by {multiple}, which this model needs; "
                f"the nearest that is: {width}x{height}"
            )

    def _check_autoregressive(self, pipe: Any) -> None:
        adapter = pipe.adapter
        if not adapter.makes_pixels:
            raise UnsupportedError(
                f"{adapter.name} makes tokens for a diffusion model, not pixels: combine the two from Python, as "
                f"{type(adapter).__module__} says"
            )
        if self.steps is not None:
            raise ConfigError(
                f"--steps is for diffusion models; {adapter.name} draws every token of an image. For fewer "
                f"forwards: --preset {' or '.join(presets_for(pipe))}"
            )
        if self.guidance is not None and self.guidance < 1:
            raise ConfigError(f"guidance must be at least 1 (1 is off), got {self.guidance}")
        width, height = self.size or (None, None)
        adapter.layout(height, width)

    @property
    def _sampling(self) -> dict[str, Any]:
        given = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return {name: value for name, value in given.items() if value is not None}

    def arguments(self, pipe: Any) -> dict[str, Any]:
        chosen: dict[str, Any] = {}
        if self.steps is not None:
            chosen["num_inference_steps"] = self.steps
        if self.size is not None:
            chosen["width"], chosen["height"] = self.size
        if self.guidance is not None:
            chosen[guidance_argument(pipe)] = self.guidance
        return chosen | self._sampling


#: Which of a pipeline's arguments an option sets.
_ARGUMENTS = {
    "--steps": ("num_inference_steps",),
    "--size": ("width", "height"),
    "--guidance": ("true_cfg_scale", "guidance_scale"),
}


def guidance_argument(pipe: Any) -> str:
    """FLUX calls classifier-free guidance "true"; its `guidance_scale` feeds a distilled embedding."""
    accepted = inspect.signature(pipe.__call__).parameters
    return "true_cfg_scale" if "true_cfg_scale" in accepted else "guidance_scale"


def size_multiple(pipe: Any) -> int:
    """What width and height must be multiples of, in pixels."""
    processor = getattr(pipe, "image_processor", None)
    return int(getattr(getattr(processor, "config", None), "vae_scale_factor", 8))


def run(
    pipe: Any,
    jobs: Sequence[Job],
    settings: Settings,
    on_step: Callable[[int], None] = lambda steps: None,
    on_preview: Callable[[int, Callable[[], list[Any]]], None] | None = None,
) -> torch.Tensor:
    """One call of the pipeline for a batch of jobs: (B, 3, H, W) float in [0, 1] on the CPU.

    Args:
        on_step: called with the number of steps done since the last time: denoising steps, or image tokens.
        on_preview: called after steps of an autoregressive pipeline with the finished tokens and a function that gives the
            images as far as they are.

    Raises:
        UnsupportedError: the pipeline refuses the call; it says why.
    """
    arguments = settings.arguments(pipe)
    if _accepts(pipe, "callback_on_step_end"):
        tokens, before = is_autoregressive(pipe), 0

        def advance(pipe: Any, step: int, time: Any, tensors: dict) -> dict:
            nonlocal before
            on_step(step - before if tokens else 1)  # tokens get finished several at a time
            before = step
            if on_preview is not None and "preview" in tensors:
                on_preview(step, tensors["preview"])
            return tensors

        arguments["callback_on_step_end"] = advance
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(job.seed) for job in jobs]
    prompts = [_as_prompt(pipe, job.prompt) for job in jobs]
    try:
        images = pipe(prompts, generator=generators, output_type="pt", **arguments).images
    except AccelError:
        raise
    except (
        ValueError,
        TypeError,
    ) as error:  # how pipelines refuse a call: their check_inputs, or its signature
        raise UnsupportedError(f"{type(pipe).__name__} refuses this call: {error}") from error
    return images.detach().float().cpu().clamp(0, 1)


def _as_prompt(pipe: Any, text: str) -> Any:
    """Text, or for models of classes the number of one."""
    if not is_autoregressive(pipe) or str in pipe.adapter.prompt_types:
        return text
    if not text.isdecimal():
        raise ConfigError(
            f"{pipe.adapter.name} makes images of numbered classes: give a number, not {text!r}"
        )
    return int(text)


def _accepts(pipe: Any, name: str) -> bool:
    parameters = inspect.signature(pipe.__call__).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@dataclass(frozen=True)
class Decoding:
    """What drawing a batch of images from an autoregressive model took.

    Attributes:
        forwards: forwards of the model for the batch, the prompts' included (NFE); plain: the image's tokens.
        tokens_per_forward: mean over images; 1 if plain.
        tv_per_token: total variation spent per token; 0 if lossless or plain.
        window: tokens fed per forward; 1 if plain.
    """

    forwards: int
    tokens_per_forward: float = 1.0
    tv_per_token: float = 0.0
    window: int = 1

    @staticmethod
    def of(stats: Any, calls: int | None) -> Decoding | None:
        """From an acceleration's statistics of this batch alone; plain (`stats` is None): from the number of
        forwards that were measured. None if that is unknown, because they were compiled."""
        if stats is not None:
            # Not the measured ones: a first call times windows. A run's prompts take one forward more.
            forwards = stats.forwards + stats.runs
            return Decoding(forwards, stats.tokens_per_forward, stats.tv_per_token, stats.window)
        return None if calls is None else Decoding(calls)


@dataclass
class Generated:
    """A batch, once generated: images (B, 3, H, W), wall seconds of the call, seconds in the denoiser (or in
    the autoregressive model's forwards), the acceleration's statistics, what decoding took."""

    images: torch.Tensor
    seconds: float
    denoiser_seconds: float | None
    stats: Any = None
    decoding: Decoding | None = None


class Way:
    """One way to call a pipeline, plain or accelerated; several ways can take turns on one pipeline.

    A denoiser's hooks are attached for the time of a call. A decoder measures which window is fastest: it stays,
    on a shallow copy of the pipeline that shares the model, and measures once.

    Args:
        attach: pipeline → context manager that accelerates it and gives a `Handle`, or None if it is plain.
        stays: attached from now on, not for the time of a call.
    """

    def __init__(
        self, pipe: Any, attach: Callable[[Any], AbstractContextManager[Any]], *, stays: bool = False
    ) -> None:
        self._pipe, self._attach = pipe, attach
        self._stays, self._stack, self._handle = stays or is_autoregressive(pipe), ExitStack(), None
        if self._stays:
            self._pipe = copy.copy(pipe) if is_autoregressive(pipe) else pipe
            self._handle = self._stack.enter_context(attach(self._pipe))

    @staticmethod
    def of(pipe: Any, config: Any, *, compile: bool = False) -> Way:
        """With a configuration; None: plain.

        Args:
            compile: see `accelerate`; attached from now on, so that nothing is compiled twice.
        """
        return Way(pipe, partial(_accelerated, config=config, compile=compile), stays=compile)

    @contextmanager
    def ready(self) -> Iterator[tuple[Any, Any]]:
        """The pipeline to call, and its handle or None."""
        if self._stays:
            yield self._pipe, self._handle
        else:
            with self._attach(self._pipe) as handle:
                yield self._pipe, handle


@contextmanager
def _accelerated(pipe: Any, config: Any, compile: bool) -> Iterator[Any]:
    if config is None:
        yield None
    else:
        with accelerate(pipe, config, compile=compile) as handle:
            yield handle


def timed(
    pipe: Any,
    jobs: Sequence[Job],
    settings: Settings,
    config: Any = None,
    on_step: Callable[[int], None] = lambda steps: None,
    on_preview: Callable[[int, Callable[[], list[Any]]], None] | None = None,
) -> Generated:
    """`run`, measured; accelerated for just this call if a config is given.

    Args:
        pipe: a pipeline; or a `Way`, which has its configuration.
    """
    way = pipe if isinstance(pipe, Way) else Way.of(pipe, config)
    with way.ready() as (called, handle):
        if handle is not None:
            handle.stats.reset()
        with measure(called) as clock:
            images = run(called, jobs, settings, on_step, on_preview)
        # A copy: the next call through a handle that stays starts counting anew.
        stats = copy.copy(handle.stats) if handle is not None else None
        calls = clock.calls or default_steps(called, settings)  # plain decoding's, where nobody could count
        decoding = Decoding.of(stats, calls) if is_autoregressive(called) else None
    return Generated(images, clock.seconds, clock.denoiser_seconds, stats, decoding)


def default_steps(pipe: Any, settings: Settings | None = None) -> int | None:
    """What the pipeline does when nobody says how many steps: denoising steps, or an image's tokens."""
    if is_autoregressive(pipe):
        width, height = (settings and settings.size) or (None, None)
        return pipe.adapter.layout(height, width).slots
    parameter = inspect.signature(pipe.__call__).parameters.get("num_inference_steps")
    return parameter.default if parameter and isinstance(parameter.default, int) else None


def call_in_full(pipe: Any, settings: Settings) -> dict[str, Any]:
    """What a call runs with, the pipeline's own defaults written out: steps and guidance, or guidance and sampling.

    What the pipeline has no such argument for is left out.
    """
    if is_autoregressive(pipe):
        defaults = vars(pipe.adapter.defaults())
        return {**defaults, **settings.arguments(pipe)}
    parameters = inspect.signature(pipe.__call__).parameters
    names = "num_inference_steps", guidance_argument(pipe)
    defaults = {name: parameters[name].default for name in names if name in parameters}
    call = {**defaults, **settings.arguments(pipe)}
    return {
        "steps": call.get("num_inference_steps"),
        "guidance": call.get(guidance_argument(pipe)),
        "scheduler": type(scheduler_of(pipe)).__name__,
    }


def versions() -> dict[str, str]:
    """Of what an image depends on."""
    packages = {
        "accel": "accel-image",
        "torch": "torch",
        "diffusers": "diffusers",
        "transformers": "transformers",
    }
    found = {}
    for name, package in packages.items():
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # a bare source tree on the path
            found[name] = "unknown"
    return found


def presets_for(pipe: Any) -> list[str]:
    """Presets of methods for pipelines of this kind."""
    from .methods.speculation import SpeculativeDecodingConfig

    return [
        name
        for name in configs.names()
        if isinstance(configs.load(name), SpeculativeDecodingConfig) == is_autoregressive(pipe)
    ]


def check_can_accelerate(pipe: Any, config: Any) -> None:
    """Attach and detach once, so that a bad combination fails before any image is made."""
    try:
        accelerate(pipe, config).remove()
    except UnsupportedError as error:
        raise UnsupportedError(
            f"{error} (presets for this model: {', '.join(presets_for(pipe))}; leave --preset out to generate "
            "without acceleration)"
        ) from error
