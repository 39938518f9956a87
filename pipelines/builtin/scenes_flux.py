"""The built-in diffusion model: `FluxPipeline` as it is, with defaults that fit a 256 px model of Scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline

from accel.errors import WeightsError
from accel.pipelines.folders import AGAIN, load_as

from .words import known_prompts


class ScenesFluxPipeline(FluxPipeline):
    """`FluxPipeline` whose defaults are the built-in model's: 256 px, guidance against the empty prompt.

    The folder it loads is a plain `FluxPipeline` folder and loads as one, too.
    """

    default_steps = 20
    default_guidance = 3.0
    text_tokens = 16

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> ScenesFluxPipeline:
        """Load from a folder, onto the CPU.

        Raises:
            WeightsError: a file is missing or corrupt; names the file.
        """
        try:
            return load_as(cls, folder, dtype)
        except WeightsError as error:
            advice = "Reinstall the package, or train the model: examples/train_scenes_diffusion.py"
            raise WeightsError(f"{str(error).removesuffix(AGAIN).rstrip('. ')}. {advice}") from error

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> ScenesFluxPipeline:
        """See `FluxPipeline.from_pretrained`."""
        pipe = super().from_pretrained(*args, **kwargs)
        # FluxPipeline sets 128 in its __init__, whose signature diffusers reads: it cannot be overridden there.
        pipe.default_sample_size = 64  # latent side; times the autoencoder's 4 = 256 px
        return pipe

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        num_inference_steps: int = default_steps,
        true_cfg_scale: float = default_guidance,
        negative_prompt: str | list[str] | None = None,
        max_sequence_length: int = text_tokens,
        **kwargs: Any,
    ) -> Any:
        """See `FluxPipeline.__call__`. `true_cfg_scale=1` turns guidance off and halves the work."""
        if prompt is not None:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            prompt = known_prompts(prompts, self.tokenizer_2.get_vocab(), stacklevel=2)
            if true_cfg_scale > 1:
                # FluxPipeline does not spread one negative prompt over a batch.
                negative = negative_prompt if negative_prompt is not None else ""
                negative_prompt = [negative] * len(prompts) if isinstance(negative, str) else negative
        return super().__call__(
            prompt,
            num_inference_steps=num_inference_steps,
            true_cfg_scale=true_cfg_scale,
            negative_prompt=negative_prompt,
            max_sequence_length=max_sequence_length,
            **kwargs,
        )
