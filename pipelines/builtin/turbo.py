"""The built-in diffusion model distilled to four steps without guidance: a side-car merged into a loaded pipeline.

Made by examples/distill_few_steps.py. One call a step instead of two, as FLUX.1-schnell and the Turbo and Lightning
versions of large models do, so that what is for such models can be tried and measured on one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accel.core import sidecar
from accel.errors import WeightsError

from .scenes_flux import ScenesFluxPipeline

KIND = "few steps"
FILE = Path(__file__).parent / "scenes-flux" / "turbo.safetensors"


class ScenesTurboPipeline(ScenesFluxPipeline):
    """`ScenesFluxPipeline` with the distilled model's defaults: four steps, no guidance."""

    default_steps = 4
    default_guidance = 1.0
    default_preset = "few-step"

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        num_inference_steps: int = default_steps,
        true_cfg_scale: float = default_guidance,
        **kwargs: Any,
    ) -> Any:
        """See `ScenesFluxPipeline.__call__`. It was distilled from guided steps: guidance on top of them overshoots."""
        return super().__call__(
            prompt, num_inference_steps=num_inference_steps, true_cfg_scale=true_cfg_scale, **kwargs
        )


def add_to(pipe: ScenesFluxPipeline, file: Path = FILE) -> None:
    """Change the pipeline's transformer, for good.

    Raises:
        WeightsError: the file is missing or corrupt, or was trained for another model.
    """
    try:
        sidecar.read(file, KIND).merge(pipe.transformer)
    except WeightsError as error:
        advice = "Reinstall the package, or train it: examples/distill_few_steps.py"
        raise WeightsError(f"{str(error).rstrip('. ')}. {advice}") from error
