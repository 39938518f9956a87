"""The built-in diffusion model: `FluxPipeline` as it is, with defaults that fit a 256 px model of Scenes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline

from accel.backends import dtype_argument
from accel.errors import WeightsError

from .words import known_prompts

_WEIGHT_FILES = (
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder_2/model.safetensors",
)


def _check_files(folder: Path) -> None:
    """Names the broken file before a loader fails on it with a message about something else."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model_index.json"
    advice = "Reinstall the package, or train the model: examples/train_scenes_diffusion.py"
    try:
        json.loads(index.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{index}: cannot be read ({error.strerror}). {advice}") from error
    except ValueError as error:
        raise WeightsError(f"{index}: not JSON ({error}). {advice}") from error
    for name in _WEIGHT_FILES:
        path = folder / name
        if not path.is_file():
            raise WeightsError(f"{path}: weight file is missing. {advice}")
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise WeightsError(f"{path}: corrupt weight file ({error}). {advice}") from error


class ScenesFluxPipeline(FluxPipeline):
    """`FluxPipeline` whose defaults are the built-in model's: 256 px, guidance against the empty prompt.

    The folder it loads is a plain `FluxPipeline` folder and loads as one, too.
    """

    default_steps = 20
    default_guidance = 3.0
    text_tokens = 16

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> ScenesFluxPipeline:
        _check_files(folder)
        with warnings.catch_warnings():
            # transformers builds its tokenizers through SWIG modules that lack __module__ (Python 3.12+).
            warnings.filterwarnings("ignore", category=DeprecationWarning, message="builtin type .*")
            pipe = cls.from_pretrained(folder, **dtype_argument(dtype), local_files_only=True)
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
