"""Generating with any pipeline, plain and accelerated, from the same seeds: what the command line runs.

An image's noise depends on its seed alone, so it does not matter which batch it falls into.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from .api import accelerate
from .backends import dtype_argument, require_sound_stack
from .errors import ConfigError, UnsupportedError, WeightsError

T = TypeVar("T")
BUILTIN = "builtin"
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
    """The built-in model, a local diffusers folder, or a hub id. Pickled weights are refused.

    Args:
        model: "builtin", a folder with a model_index.json, or a hub id.
        device: default: CUDA if there is one, else CPU.
        dtype: a key of `DTYPES`; default: bfloat16 on CUDA, float32 elsewhere.

    Raises:
        WeightsError: the model cannot be loaded; says why and what to do.
        ConfigError: unknown dtype.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    require_sound_stack()
    if model == BUILTIN:
        from .pipelines import builtin

        return builtin.load_pipeline(device, DTYPES[dtype] if dtype else None)
    from diffusers import DiffusionPipeline

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(model)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise WeightsError(f"{folder}: not a diffusers pipeline folder (it has no model_index.json)")
    if folder.exists() and _only_pickles(folder):
        raise WeightsError(
            f"{folder}: its weights are pickles (.bin/.pt/.ckpt), which can run any code when loaded and are "
            "refused. Convert them to safetensors: pipe.save_pretrained(folder, safe_serialization=True)"
        )
    torch_dtype = DTYPES[dtype] if dtype else (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    try:
        pipe = DiffusionPipeline.from_pretrained(model, **dtype_argument(torch_dtype), use_safetensors=True)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{model}: cannot be loaded as a diffusers pipeline: {error}") from error
    return pipe.to(device)


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
    """How to call the pipeline; None leaves the pipeline's own default."""

    steps: int | None = None
    size: tuple[int, int] | None = None
    guidance: float | None = None

    def check(self, pipe: Any) -> None:
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")
        if self.size is None:
            return
        multiple = size_multiple(pipe)
        if any(side % multiple for side in self.size):
            width, height = (max(multiple, round(side / multiple) * multiple) for side in self.size)
            raise ConfigError(
                f"size {self.size[0]}x{self.size[1]} is not divisible by {multiple}, which this model needs; "
                f"the nearest that is: {width}x{height}"
            )

    def arguments(self, pipe: Any) -> dict[str, Any]:
        chosen: dict[str, Any] = {}
        if self.steps is not None:
            chosen["num_inference_steps"] = self.steps
        if self.size is not None:
            chosen["width"], chosen["height"] = self.size
        if self.guidance is not None:
            chosen[guidance_argument(pipe)] = self.guidance
        return chosen


def guidance_argument(pipe: Any) -> str:
    """FLUX calls classifier-free guidance "true"; its `guidance_scale` feeds a distilled embedding."""
    accepted = inspect.signature(pipe.__call__).parameters
    return "true_cfg_scale" if "true_cfg_scale" in accepted else "guidance_scale"


def size_multiple(pipe: Any) -> int:
    """What width and height must be multiples of, in pixels."""
    processor = getattr(pipe, "image_processor", None)
    return int(getattr(getattr(processor, "config", None), "vae_scale_factor", 8))


def run(
    pipe: Any, jobs: Sequence[Job], settings: Settings, on_step: Callable[[], None] = lambda: None
) -> torch.Tensor:
    """One call of the pipeline for a batch of jobs: (B, 3, H, W) float in [0, 1] on the CPU."""
    arguments = settings.arguments(pipe)
    if _accepts(pipe, "callback_on_step_end"):

        def advance(pipe: Any, step: int, time: Any, tensors: dict) -> dict:
            on_step()
            return tensors

        arguments["callback_on_step_end"] = advance
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(job.seed) for job in jobs]
    prompts = [job.prompt for job in jobs]
    images = pipe(prompts, generator=generators, output_type="pt", **arguments).images
    return images.detach().float().cpu().clamp(0, 1)


def _accepts(pipe: Any, name: str) -> bool:
    parameters = inspect.signature(pipe.__call__).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@dataclass
class Run:
    """A batch, once generated: images (B, 3, H, W), wall seconds of the call, seconds in the denoiser."""

    images: torch.Tensor
    seconds: float
    denoiser_seconds: float | None
    stats: Any = None


def timed(
    pipe: Any, jobs: Sequence[Job], settings: Settings, config: Any = None, on_step: Any = lambda: None
) -> Run:
    """`run`, measured; accelerated for just this call if a config is given."""
    from .evaluation.timing import measure

    with ExitStack() as stack:
        handle = stack.enter_context(accelerate(pipe, config) if config is not None else nullcontext())
        clock = stack.enter_context(measure(pipe))
        images = run(pipe, jobs, settings, on_step)
    return Run(images, clock.seconds, clock.denoiser_seconds, handle.stats if handle else None)


def default_steps(pipe: Any) -> int | None:
    """What the pipeline does when nobody says how many steps."""
    parameter = inspect.signature(pipe.__call__).parameters.get("num_inference_steps")
    return parameter.default if parameter and isinstance(parameter.default, int) else None


def check_can_accelerate(pipe: Any, config: Any) -> None:
    """Attach and detach once, so that a bad combination fails before any image is made."""
    try:
        accelerate(pipe, config).remove()
    except UnsupportedError as error:
        raise UnsupportedError(f"{error} (leave --preset out to generate without acceleration)") from error
