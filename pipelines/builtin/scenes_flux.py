"""The built-in diffusion model: `FluxPipeline` as it is, with defaults that fit a 256 px model of Scenes."""

from __future__ import annotations

from typing import Any

from diffusers import FluxPipeline

from .words import known_prompts


class ScenesFluxPipeline(FluxPipeline):
    """`FluxPipeline` whose defaults are the built-in model's: 256 px, guidance against the empty prompt.

    The folder it loads is a plain `FluxPipeline` folder and loads as one, too.
    """

    default_steps = 20
    default_guidance = 3.0
    text_tokens = 16
    spelt: frozenset[str] = frozenset()  # words it knows that are not in the vocabulary

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
            vocabulary = {*self.tokenizer_2.get_vocab(), *self.spelt}
            prompt = known_prompts(prompts, vocabulary, stacklevel=2)
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
