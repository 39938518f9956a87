"""Images from an autoregressive model, in the manner of a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from accel.core.checks import check, is_number, is_whole
from accel.core.decoding import Decoder, Sampling, decode
from accel.errors import ConfigError, UnsupportedError

from .adapter import CheckpointAdapter, Layout
from .kept import Kept, graphs_by_default
from .loading import class_name
from .model import PromptedModel, forward_once
from .registry import find

Pipeline = TypeVar("Pipeline", bound="AutoregressivePipeline")
OUTPUT_TYPES = ("pil", "np", "pt", "tokens")

#: Called as diffusers calls it: (pipeline, finished slots, slots of an image, {"preview": function}). The function gives PIL
#: images as far as they are, grey below; [] where there is nothing to see yet. It waits for the device and runs the VQ decoder.
Callback = Callable[["AutoregressivePipeline", int, int, dict[str, Any]], Any]


@dataclass
class AutoregressiveOutput:
    """What a call gives.

    Attributes:
        images: PIL images; or float in [0, 1], (B, H, W, 3) for "np" and (B, 3, H, W) for "pt"; or for "tokens"
            int64 (B, rows * columns).
    """

    images: Any


class AutoregressivePipeline:
    """Prompts in, images out, token by token.

    Attributes:
        adapter: the loaded model and what is known about its family.
        decoder: how tokens are drawn, `accel.core.decoding.decode` unless `accel.accelerate` put another one there.
        model: the transformers model (or the family's own).
        graphs: on a GPU, capture rounds of decoding in CUDA graphs, and compile the layers of families that
            `Stack` knows. The first image of every batch size then takes seconds more, later ones a fraction. Where a
            module has hooks, is compiled itself, or is an adapter's (LoRA), all runs as it is.

    Args:
        graphs: None: unless the environment says ACCEL_GRAPHS=0.

    >>> pipe = AutoregressivePipeline.from_pretrained(folder).to("cuda")         # doctest: +SKIP
    >>> image = pipe("a red circle left of a blue square").images[0]             # doctest: +SKIP
    """

    def __init__(self, adapter: CheckpointAdapter, *, graphs: bool | None = None) -> None:
        self.adapter = adapter
        self.graphs = graphs_by_default() if graphs is None else graphs
        self._kept = Kept()
        self.decoder: Decoder = decode
        self._forward: Callable[..., Tensor] = forward_once
        self._bar: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls: type[Pipeline],
        source: str,
        *,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        graphs: bool | None = None,
        **options: Any,
    ) -> Pipeline:
        """Load a checkpoint, onto the CPU. Only safetensors are read, and the tensors of LlamaGen's .pt files.

        Args:
            source: a folder written by `save_pretrained`, or the id of a model on the hub.
            torch_dtype, dtype: of the weights (two names for one thing); default float32.
            graphs: see the class.
            options: transformers' own: subfolder, revision, cache_dir, token, local_files_only.

        Raises:
            WeightsError: missing, corrupt or pickled weights; the message names the file.
            UnknownNameError: no adapter knows the model's class.
            UnsupportedError: the checkpoint cannot make images.
        """
        source = str(source)
        adapter = find(class_name(source, **options))
        return cls(adapter.load(source, torch_dtype or dtype or torch.float32, **options), graphs=graphs)

    @property
    def model(self) -> Any:
        return self.adapter.model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def timed(self) -> nn.Module | None:
        """What every forward calls, for a clock to stand around; None where forwards are compiled or captured."""
        if self._kept.look(self.adapter, self.graphs) or self._forward is not forward_once:
            return None
        return self._kept.stack or self.adapter.backbone

    def to(self: Pipeline, *args: Any, **kwargs: Any) -> Pipeline:
        """Move to a device, or to a dtype, as `torch.nn.Module.to`."""
        self._kept.clear()
        self.model.to(*args, **kwargs)
        return self

    def release(self, decoder: Any = None) -> None:
        """Give back what is kept between calls: memory and graphs; with a decoder, only what it captured."""
        if decoder is None:
            self._kept.clear()
        else:
            self._kept.forget(decoder)

    def compile(self: Pipeline, **options: Any) -> Pipeline:
        """Compile the forward; the first images of every batch size and window width then take a while.

        Args:
            options: `torch.compile`'s own.
        """
        self._forward = torch.compile(forward_once, **{"fullgraph": True, **options})
        return self

    def set_progress_bar_config(self, **options: Any) -> None:
        """Arguments for tqdm; `disable=True` turns the bar off."""
        self._bar = options

    @torch.inference_mode(
        False
    )  # what is kept for the next call must be writable there, in whatever mode that is
    @torch.no_grad()
    def __call__(
        self,
        prompt: Any,
        *,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
    ) -> AutoregressiveOutput:
        """Make images.

        Args:
            prompt: one or a list; lengths may differ.
            height, width: in pixels; None: the model's own.
            num_images_per_prompt: images of a prompt follow each other in the output.
            guidance_scale: strength of classifier-free guidance; 1 turns it off and halves the work.
            temperature, top_k, top_p: see `accel.core.decoding.Sampling`. None for these and guidance_scale: what
                the checkpoint's generation configuration says, else 1, all tokens, no guidance.
            generator: one for the call, or one per image. An image depends on its own generator alone: the
                same seed gives the same image in any batch. None: torch's global one.
            output_type: "pil", "np", "pt" or "tokens".
            callback_on_step_end: called as slots get finished; can ask for a preview (`Callback`).

        Raises:
            ConfigError: an argument is out of range.
            UnsupportedError: a prompt that does not fit into the model's context, or pixels from a model that
                makes none.
            NumericsError: the model computed NaN.
        """
        prompts = self._prompts(prompt, num_images_per_prompt)
        check(output_type in OUTPUT_TYPES, "output_type", f"one of {', '.join(OUTPUT_TYPES)}", output_type)
        if output_type != "tokens" and not self.adapter.makes_pixels:
            raise UnsupportedError(f"{self.adapter.name} makes tokens, not pixels: pass output_type='tokens'")
        defaults = self.adapter.defaults()
        guidance = defaults.guidance_scale if guidance_scale is None else guidance_scale
        check(is_number(guidance) and guidance >= 1, "guidance_scale", "a number >= 1 (1 is off)", guidance)
        sampling = Sampling(
            temperature=defaults.temperature if temperature is None else temperature,
            top_k=defaults.top_k if top_k is None else top_k,
            top_p=defaults.top_p if top_p is None else top_p,
        )
        generators = _generators(generator, len(prompts), self.device)
        layout = self.adapter.layout(height, width)
        model, key = self._prompted(prompts, layout, guidance)
        with tqdm(total=layout.slots, **self._bar) as bar:

            def on_slots(finished: int) -> None:
                bar.update(finished - bar.n)
                if callback_on_step_end is not None:
                    preview = partial(self._preview, model, finished)
                    callback_on_step_end(self, finished, layout.slots, {"preview": preview})

            token_BN = self.decoder(model, sampling, generators, on_slots)
        model.check()
        if key is not None:
            self._kept.give(key, model)
        token_BT = layout.finished(token_BN)
        if output_type == "tokens":
            return AutoregressiveOutput(token_BT)
        return AutoregressiveOutput(_as(output_type, self.adapter.images(token_BT, layout)))

    def _preview(self, model: PromptedModel, finished: int) -> list[Any]:
        drawn = model.so_far(finished) if self.adapter.makes_pixels else None
        if drawn is None:
            return []
        token_BT, rows = drawn
        image_B3HW = self.adapter.images(token_BT, model.layout)
        image_B3HW[:, :, image_B3HW.shape[2] * rows // model.layout.rows :] = 0.5
        return _as("pil", image_B3HW)

    def _prompted(
        self, prompts: list[Any], layout: Layout, guidance: float
    ) -> tuple[PromptedModel, tuple | None]:
        """The prompts, read; and under which key to keep the model afterwards, None: not at all."""
        captures, plain = self._kept.look(self.adapter, self.graphs), self._forward is forward_once
        key = (layout, len(prompts), guidance > 1, self._forward) if captures else None
        model = self._kept.take(key) if captures else None
        if model is None or not model.read(prompts, guidance):
            model = PromptedModel(
                self.adapter,
                layout,
                prompts,
                guidance,
                forward=self._forward,
                # Elsewhere, and compiled, the few places that need not be looked at cost less than new shapes.
                grow=plain and (captures or self.device.type == "cpu"),
                stack=self._kept.stack,
                rounds=self._kept.rounds(self.device, key) if captures else None,
            )
        return model, key

    def _prompts(self, prompt: Any, copies: int) -> list[Any]:
        check(is_whole(copies) and copies >= 1, "num_images_per_prompt", "a whole number >= 1", copies)
        types = self.adapter.prompt_types
        prompts = [prompt] if isinstance(prompt, types) else prompt
        wanted = " or ".join(kind.__name__ for kind in types)
        if not isinstance(prompts, (list, tuple)) or not prompts:
            raise ConfigError(f"prompt must be a {wanted} or a list of them, got {prompt!r}")
        if wrong := [one for one in prompts if not isinstance(one, types)]:
            raise ConfigError(f"prompt must be a {wanted} or a list of them; the list has {wrong[0]!r}")
        return [one for one in prompts for _ in range(copies)]


def _generators(
    given: torch.Generator | Sequence[torch.Generator] | None, images: int, device: torch.device
) -> list[torch.Generator]:
    """One generator per image, on the model's device, seeded from the user's."""
    sources: Iterable[torch.Generator | None]
    if given is None or isinstance(given, torch.Generator):
        sources = [given] * images
    elif not isinstance(given, (list, tuple)) or any(not isinstance(one, torch.Generator) for one in given):
        raise ConfigError(
            f"generator must be a torch.Generator or a list of them, on any device, got {given!r}"
        )
    elif len(given) == images:
        sources = given
    else:
        raise ConfigError(f"generator: expected one, or a list of one per image ({images}), got {len(given)}")
    return [torch.Generator(device).manual_seed(_seed(source)) for source in sources]


def _seed(source: torch.Generator | None) -> int:
    device = "cpu" if source is None else source.device
    return int(torch.randint(2**63 - 1, (1,), generator=source, device=device).item())


def _as(output_type: str, image_B3HW: Tensor) -> Any:
    if output_type == "pt":
        return image_B3HW
    image_BHW3 = image_B3HW.permute(0, 2, 3, 1).float().cpu().numpy()
    if output_type == "np":
        return image_BHW3
    return [Image.fromarray(image) for image in (image_BHW3 * 255).round().astype(np.uint8)]
