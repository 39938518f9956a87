"""Generating with any pipeline, plain and accelerated, from the same seeds: what the command line runs.

An image's noise depends on its seed alone, so it does not matter which batch it falls into.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from . import configs
from .api import accelerate
from .backends import dtype_argument, require_sound_stack
from .decoding import Sampling
from .errors import ConfigError, UnsupportedError, WeightsError

T = TypeVar("T")
BUILTIN, BUILTIN_AR = "builtin", "builtin-ar"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_size(text: str) -> tuple[int, int]:
    """ "512" or "768x512" (width x height) → (width, height)."""
    parts = text.lower().split("x")
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers, default=0) < 1:
        raise ConfigError(f"size {text!r} is neither a number of pixels (512) nor WIDTHxHEIGHT (768x512)")
    return numbers[0], numbers[-1]


def load_pipeline(model: str = BUILTIN, device: str | None = None, dtype: str | None = None) -> Any:
    """A built-in model, a local folder, or a hub id: a diffusers pipeline, or an autoregressive one. Pickled
    weights are refused.

    Args:
        model: "builtin", "builtin-ar", a folder or a hub id. What has a model_index.json is loaded by diffusers;
            what has only a config.json (or is LlamaGen's), as an `AutoregressivePipeline`.
        device: default: CUDA if there is one, else CPU.
        dtype: a key of `DTYPES`; default: bfloat16 on CUDA, float32 elsewhere.

    Raises:
        WeightsError: the model cannot be loaded; says why and what to do.
        UnknownNameError: an autoregressive model of a class that no adapter knows.
        ConfigError: unknown dtype, or a device that this machine or this torch does not have.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if device is not None:
        _check(device)
    require_sound_stack()
    if model in (BUILTIN, BUILTIN_AR):
        from .pipelines import builtin

        load = builtin.load_pipeline if model == BUILTIN else builtin.load_autoregressive
        return load(device, DTYPES[dtype] if dtype else None)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch_dtype = DTYPES[dtype] if dtype else (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    folder = Path(model)
    if not _is_diffusers(model):
        from .pipelines.autoregressive import AutoregressivePipeline

        return AutoregressivePipeline.from_pretrained(model, dtype=torch_dtype).to(device)
    from diffusers import DiffusionPipeline

    if folder.exists() and _only_pickles(folder):
        raise WeightsError(
            f"{folder}: its weights are pickles (.bin/.pt/.ckpt), which can run any code when loaded and are "
            "refused. Convert them to safetensors: pipe.save_pretrained(folder, safe_serialization=True)"
        )
    try:
        pipe = DiffusionPipeline.from_pretrained(model, **dtype_argument(torch_dtype), use_safetensors=True)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{model}: cannot be loaded as a diffusers pipeline: {error}") from error
    return pipe.to(device)


def _check(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # builds without CUDA only assert
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {device!r} cannot be used here ({reason}); cpu always works") from error


def _is_diffusers(model: str) -> bool:
    """Whether diffusers saved it: it has a model_index.json. Raises for a folder that nobody saved."""
    from .pipelines.autoregressive.loading import read_json

    folder = Path(model)
    if not folder.exists():
        if model.startswith((".", "/", "~")) or model.count("/") != 1:  # no hub id looks like that
            raise WeightsError(f"{model}: there is no such folder, and hub ids are of the form owner/name")
        return read_json(model, "model_index.json") is not None
    if (folder / "model_index.json").is_file():
        return True
    if not (folder / "config.json").is_file() and not any(folder.glob("[ct]2i_*")):
        raise WeightsError(
            f"{folder}: neither a diffusers pipeline folder (it has no model_index.json) nor that of an "
            "autoregressive model (it has no config.json)"
        )
    return False


def is_autoregressive(pipe: Any) -> bool:
    """Whether it makes images token by token."""
    from .pipelines.autoregressive import AutoregressivePipeline

    return isinstance(pipe, AutoregressivePipeline)


def _only_pickles(folder: Path) -> bool:
    has = {suffix: any(folder.rglob(f"*{suffix}")) for suffix in (".safetensors", ".bin", ".pt", ".ckpt")}
    return not has.pop(".safetensors") and any(has.values())


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
        temperature, top_k, top_p: see `accel.decoding.Sampling`; for autoregressive models only.
    """

    steps: int | None = None
    size: tuple[int, int] | None = None
    guidance: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

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
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")
        if self.size is None:
            return None
        multiple = size_multiple(pipe)
        if any(side % multiple for side in self.size):
            width, height = (max(multiple, round(side / multiple) * multiple) for side in self.size)
            raise ConfigError(
                f"size {self.size[0]}x{self.size[1]} is not divisible by {multiple}, which this model needs; "
                f"the nearest that is: {width}x{height}"
            )
        return None

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
        Sampling(**self._sampling)
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


def guidance_argument(pipe: Any) -> str:
    """FLUX calls classifier-free guidance "true"; its `guidance_scale` feeds a distilled embedding."""
    accepted = inspect.signature(pipe.__call__).parameters
    return "true_cfg_scale" if "true_cfg_scale" in accepted else "guidance_scale"


def size_multiple(pipe: Any) -> int:
    """What width and height must be multiples of, in pixels."""
    processor = getattr(pipe, "image_processor", None)
    return int(getattr(getattr(processor, "config", None), "vae_scale_factor", 8))


def run(
    pipe: Any, jobs: Sequence[Job], settings: Settings, on_step: Callable[[int], None] = lambda steps: None
) -> torch.Tensor:
    """One call of the pipeline for a batch of jobs: (B, 3, H, W) float in [0, 1] on the CPU.

    Args:
        on_step: called with the number of steps done since the last time: denoising steps, or image tokens.
    """
    arguments = settings.arguments(pipe)
    if _accepts(pipe, "callback_on_step_end"):
        tokens, before = is_autoregressive(pipe), 0

        def advance(pipe: Any, step: int, time: Any, tensors: dict) -> dict:
            nonlocal before
            on_step(step - before if tokens else 1)  # tokens get finished several at a time
            before = step
            return tensors

        arguments["callback_on_step_end"] = advance
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(job.seed) for job in jobs]
    prompts = [_as_prompt(pipe, job.prompt) for job in jobs]
    images = pipe(prompts, generator=generators, output_type="pt", **arguments).images
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
class Run:
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
    """

    def __init__(self, pipe: Any, attach: Callable[[Any], AbstractContextManager[Any]]) -> None:
        self._pipe, self._attach = pipe, attach
        self._stays, self._stack, self._handle = is_autoregressive(pipe), ExitStack(), None
        if self._stays:
            self._pipe = copy.copy(pipe)
            self._handle = self._stack.enter_context(attach(self._pipe))

    @staticmethod
    def of(pipe: Any, config: Any) -> Way:
        """With a configuration; None: plain."""
        return Way(pipe, partial(_accelerated, config=config))

    @contextmanager
    def ready(self) -> Iterator[tuple[Any, Any]]:
        """The pipeline to call, and its handle or None."""
        if self._stays:
            yield self._pipe, self._handle
        else:
            with self._attach(self._pipe) as handle:
                yield self._pipe, handle


@contextmanager
def _accelerated(pipe: Any, config: Any) -> Iterator[Any]:
    if config is None:
        yield None
    else:
        with accelerate(pipe, config) as handle:
            yield handle


def timed(
    pipe: Any,
    jobs: Sequence[Job],
    settings: Settings,
    config: Any = None,
    on_step: Callable[[int], None] = lambda steps: None,
) -> Run:
    """`run`, measured; accelerated for just this call if a config is given.

    Args:
        pipe: a pipeline; or a `Way`, which has its configuration.
    """
    from .evaluation.timing import measure

    way = pipe if isinstance(pipe, Way) else Way.of(pipe, config)
    with way.ready() as (called, handle):
        if handle is not None:
            handle.stats.reset()
        with measure(called) as clock:
            images = run(called, jobs, settings, on_step)
        # A copy: the next call through a handle that stays starts counting anew.
        stats = copy.copy(handle.stats) if handle is not None else None
        decoding = Decoding.of(stats, clock.calls) if is_autoregressive(called) else None
    return Run(images, clock.seconds, clock.denoiser_seconds, stats, decoding)


def default_steps(pipe: Any, settings: Settings | None = None) -> int | None:
    """What the pipeline does when nobody says how many steps: denoising steps, or an image's tokens."""
    if is_autoregressive(pipe):
        width, height = (settings and settings.size) or (None, None)
        return pipe.adapter.layout(height, width).slots
    parameter = inspect.signature(pipe.__call__).parameters.get("num_inference_steps")
    return parameter.default if parameter and isinstance(parameter.default, int) else None


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
