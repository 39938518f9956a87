"""What a model family has, declared: one `Adapter` each, in a small file of its own (`accel.pipelines.diffusion`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from accel.errors import UnsupportedError

from .keyvalues import Attention
from .site import Site


@dataclass(frozen=True)
class Adapter:
    """The whole knowledge about one model family.

    Attributes:
        name: for messages.
        sites: denoiser -> its blocks in the order in which they run.
        grid_source: the denoiser's arguments, by name -> a tensor from which the token grid can be told.
            Called where torch.compile may be tracing: only pick the tensor.
        grid: (denoiser, that tensor) -> (rows, columns) of the image tokens in their order. Called once per
            run, outside of compiled code; may wait for the device.
        output_tokens: (denoiser, prediction) -> the prediction per token (B, N, c), in the tokens' order.
        with_tokens: (denoiser, prediction, tokens (B, N, c), grid) -> the prediction with these tokens in it, the
            inverse of `output_tokens`.
        per_token: (denoiser, values per token (B, N), grid) -> the same values, broadcasting to a prediction.
        shared_plan: the model can only follow one plan for the whole batch.
        attentions: denoiser -> the self-attentions whose keys and values can be kept, in any order; none if
            the model's attention cannot be hooked that way.
        refuse: called with (denoiser's arguments by name, True if tokens stay reduced between blocks); raises
            `UnsupportedError` for what cannot work.
    """

    name: str
    sites: Callable[[nn.Module], Sequence[Site]]
    grid_source: Callable[[Mapping[str, Any]], Tensor]
    grid: Callable[[nn.Module, Tensor], tuple[int, int]]
    output_tokens: Callable[[nn.Module, Tensor], Tensor]
    with_tokens: Callable[[nn.Module, Tensor, Tensor, tuple[int, int]], Tensor]
    per_token: Callable[[nn.Module, Tensor, tuple[int, int]], Tensor]
    shared_plan: bool
    attentions: Callable[[nn.Module], Sequence[Attention]] = lambda denoiser: ()
    refuse: Callable[[Mapping[str, Any], bool], None] = lambda arguments, span: None


def denoiser_of(pipe: Any) -> tuple[nn.Module, nn.Module]:
    """The module that a diffusers pipeline calls at every step, and the denoiser itself.

    They differ if the pipeline's module is torch.compile's wrapper.

    Raises:
        UnsupportedError: the object has no denoiser or no scheduler.
    """
    # Not `a or b`: a compiled module has a __len__ that raises.
    candidates = [getattr(pipe, name, None) for name in ("transformer", "unet")]
    module = next((m for m in candidates if m is not None), None)
    if not isinstance(module, nn.Module) or getattr(pipe, "scheduler", None) is None:
        if callable(getattr(pipe, "decoder", None)):
            raise UnsupportedError(
                f"{type(pipe).__name__} makes images token by token and has no denoiser: this method is for "
                "diffusers pipelines. Autoregressive pipelines take SpeculativeDecodingConfig."
            )
        raise UnsupportedError(
            "expected a diffusers pipeline with a transformer (or unet) and a scheduler, got "
            f"{type(pipe).__name__}. Pass the pipeline itself, not one of its parts."
        )
    return module, getattr(module, "_orig_mod", module)
