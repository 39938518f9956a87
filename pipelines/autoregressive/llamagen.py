"""LlamaGen (Sun et al. 2024, arXiv:2406.06525): class labels or captions to images of 256 to 1024 tokens.

The published weights are bare state dicts. Put the two files into a folder, and for a caption model the text
encoder (google/flan-t5-xl, saved with its tokenizer) into its subfolder `t5`:

    llamagen/c2i_L_384.pt  llamagen/vq_ds16_c2i.pt
    pipe = AutoregressivePipeline.from_pretrained("llamagen")
    image = pipe(207).images[0]  # ImageNet's class 207

A `config.json` is needed only where the names do not tell: `{"architectures": ["LlamaGen"], "gpt": file, "vq":
file, "image_size": pixels, "heads": attention heads, "text_encoder": folder}`, all keys but the first optional.

A caption is lower-cased and its white space collapsed. The published sampler also strips links, HTML, file names
and Chinese characters from it; captions without those are read alike. What was run: see `llamagen_model`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accel.errors import AccelWarning, ConfigError, UnsupportedError, WeightsError

from .adapter import CheckpointAdapter, Defaults, Layout, Prefix
from .llamagen_model import Gpt, load_gpt, read, rotary
from .llamagen_vq import VqDecoder, load_vq
from .loading import load_model, load_tokenizer, read_json
from .stack import Layer, Shape, Stack, plain_weights

_KEYS = {"architectures", "gpt", "vq", "image_size", "heads", "text_encoder"}


class LlamaGen(CheckpointAdapter):
    """Both kinds of LlamaGen; `load` returns the one that the checkpoint is.

    Attributes:
        image_size: pixels along an edge where a call names none.
    """

    name = "LlamaGen"
    model: Any

    def __init__(self, gpt: Gpt, vq: VqDecoder, image_size: int, tokenizer: Any = None) -> None:
        super().__init__(nn.ModuleDict({"gpt": gpt, "vq": vq}), tokenizer)
        self.gpt, self.vq, self.image_size = gpt, vq, image_size

    @classmethod
    def load(cls, source: str, dtype: torch.dtype, **options: Any) -> LlamaGen:
        """A folder as described above, in the given dtype.

        Raises:
            WeightsError: files that are missing, ambiguous, corrupt, or have unknown or missing keys.
            UnsupportedError: sizes of no published model without "heads", or no image size.
            ConfigError: an unknown key in config.json.
        """
        folder = Path(source) / options.get("subfolder", "")
        if not folder.is_dir():
            raise WeightsError(
                f"{folder}: no such folder. LlamaGen's weights are single files: download a c2i_*.pt or "
                "t2i_*.pt and its vq_*.pt into one folder and pass that"
            )
        config = read_json(str(folder), "config.json") or {}
        if unknown := set(config) - _KEYS:
            raise ConfigError(
                f"{folder / 'config.json'}: unknown keys {', '.join(sorted(unknown))}. "
                f"Known: {', '.join(sorted(_KEYS))}"
            )
        gpt_file = _one(folder, config.get("gpt"), "[ct]2i_*", "gpt")
        gpt = load_gpt(read(gpt_file), config.get("heads")).to(dtype)
        vq = load_vq(read(_one(folder, config.get("vq"), "vq_*", "vq"))).to(dtype)
        if gpt.shape.vocabulary != vq.codebook.shape[0]:
            raise WeightsError(
                f"{folder}: a transformer over {gpt.shape.vocabulary} codes and a VQ tokenizer with "
                f"{vq.codebook.shape[0]} do not belong together"
            )
        size = config.get("image_size") or int((re.findall(r"_(\d{3,4})$", gpt_file.stem) or [0])[0])
        if size <= 0 or size % vq.scale:
            raise UnsupportedError(
                f"{gpt_file.name}: the name does not end in the image size (as in c2i_B_256.pt), and config.json "
                f'has no "image_size" that is a multiple of {vq.scale} pixels'
            )
        if gpt.shape.classes is not None:
            return LlamaGenClasses(gpt, vq, size)
        return LlamaGenCaptions.with_encoder(gpt, vq, size, folder / config.get("text_encoder", "t5"), dtype)

    @property
    def backbone(self) -> Gpt:
        return self.gpt

    @property
    def vocabulary(self) -> int:
        return self.gpt.shape.vocabulary

    @property
    def codebook_VD(self) -> Tensor:
        """Codes of length 1."""
        return self.vq.codebook

    @property
    def layers(self) -> int:
        return self.gpt.shape.layers

    @property
    def context(self) -> None:
        """No limit: positions are rows and columns."""

    def layout(self, height: int | None, width: int | None) -> Layout:
        height, width, scale = height or self.image_size, width or self.image_size, self.vq.scale
        if height <= 0 or width <= 0 or height % scale or width % scale:
            raise ConfigError(
                f"height and width must be multiples of {scale} pixels, got {height} and {width}"
            )
        return Layout.plain(height // scale, width // scale)

    def embed(self, token_BW: Tensor) -> Tensor:
        return self.gpt.tok_embeddings(token_BW)

    def positions(self, place_RW: Tensor, start_R: Tensor, layout: Layout) -> Tensor:
        """Rotary cosines and sines (R, W, D / 2, 2), zero in the prefix."""
        shape = self.gpt.shape
        return rotary(place_RW - start_R[:, None], layout.columns, shape.width // shape.heads)

    def hidden(self, embedding_RWD: Tensor, bias_R1WS: Tensor, position: Tensor, key_values: Any) -> Tensor:
        return self.gpt(embedding_RWD, position, bias_R1WS, key_values)

    def stack(self) -> Stack | None:
        shape = self.gpt.shape
        layers = []
        for name in range(shape.layers):
            part = self.gpt.layers.get_submodule(str(name))
            names = ("attention.wqkv", "attention.wo", *(f"feed_forward.{n}" for n in ("w1", "w3", "w2")))
            weights = plain_weights([part.get_submodule(n) for n in names])
            if weights is None:
                return None
            qkv, out, w1, w3, w2 = weights
            norm_in, norm_mid = (part.get_parameter(f"{n}.weight") for n in ("attention_norm", "ffn_norm"))
            layers.append(Layer(norm_in, (qkv,), out, norm_mid, (w1, w3), w2))
        own = Shape(shape.heads, shape.kv_heads, shape.width // shape.heads, 1e-5, interleaved=True)
        return Stack(own, layers, self.gpt.norm.weight)

    def rotary(self, embedding_RWD: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = position.unbind(-1)
        return cos, sin

    def logits(self, hidden_RWD: Tensor) -> Tensor:
        return self.gpt.output(hidden_RWD)

    def images(self, token_BT: Tensor, layout: Layout) -> Tensor:
        pixels = self.vq(token_BT.unflatten(1, (layout.rows, layout.columns)))
        return (pixels.float() / 2 + 0.5).clamp(0, 1)


class LlamaGenClasses(LlamaGen):
    """c2i: a prompt is the index of a class; the index after the last stands for "no class"."""

    prompt_types = (int,)

    def defaults(self) -> Defaults:
        """The published sampler's."""
        return Defaults(guidance_scale=4.0, top_k=2000)

    def prefix(self, prompts: Sequence[int], layout: Layout, guided: bool) -> Prefix:
        """One token per row.

        Raises:
            ConfigError: no such class.
        """
        classes = self.gpt.shape.classes
        assert classes is not None
        if wrong := [label for label in prompts if not 0 <= label < classes]:
            raise ConfigError(f"a class must be in 0 ... {classes - 1}, got {wrong[0]}")
        labels = [*prompts, *[classes] * (len(prompts) if guided else 0)]
        label_R = torch.tensor(labels, device=self.gpt.output.weight.device)
        return Prefix(self.gpt.cls_embedding(label_R), (1,) * len(labels))


class LlamaGenCaptions(LlamaGen):
    """t2i: a prompt is a caption, read by a T5 encoder; its features, at most 120, are the prefix.

    The published sampler pads them to 120 on the left and hides the padding. As the prefix has no positions,
    leaving it out gives the same, and so does taking the last of the 120 learnt features for "no caption".
    """

    @classmethod
    def with_encoder(
        cls, gpt: Gpt, vq: VqDecoder, image_size: int, folder: Path, dtype: torch.dtype
    ) -> LlamaGenCaptions:
        """Load the text encoder from its folder beside the other parts.

        Raises:
            WeightsError: there is none, or its features have another width than the transformer reads.
        """
        from transformers import T5EncoderModel

        if not folder.is_dir():
            raise WeightsError(
                f"{folder}: no such folder. A caption model needs its text encoder there: save google/flan-t5-xl "
                'with its tokenizer, or name another folder as "text_encoder" in config.json'
            )
        self = cls(gpt, vq, image_size, load_tokenizer(str(folder)))
        encoder: Any = load_model(T5EncoderModel, str(folder), dtype)
        if encoder.config.d_model != gpt.shape.caption:
            raise WeightsError(
                f"{folder}: text features of width {encoder.config.d_model}, but the transformer reads "
                f"{gpt.shape.caption} (flan-t5-xl: 2048)"
            )
        self.model["text_encoder"] = encoder
        return self

    def defaults(self) -> Defaults:
        """The published sampler's."""
        return Defaults(guidance_scale=7.5, top_k=1000)

    def prefix(self, prompts: Sequence[str], layout: Layout, guided: bool) -> Prefix:
        """As many tokens as the caption has, at most 120; the unconditional row has as many as its twin."""
        encoder, most = self.model["text_encoder"], self.gpt.shape.prefix
        rows = [self.tokenizer(" ".join(prompt.lower().split())).input_ids for prompt in prompts]
        for prompt, row in zip(prompts, rows, strict=True):
            if len(row) > most:
                warnings.warn(
                    f"the model reads {most} tokens, the caption has {len(row)}; cut: {prompt!r}",
                    AccelWarning,
                    stacklevel=2,
                )
        # Cut as the tokenizer's own truncation does: the end token stays.
        rows = [row if len(row) <= most else [*row[: most - 1], row[-1]] for row in rows]
        lengths = [len(row) for row in rows]
        device = self.gpt.output.weight.device
        ids = torch.tensor([row + [0] * (max(lengths) - len(row)) for row in rows], device=device)
        mask = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
        features_RPE = encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        if guided:
            absent_PE = self.gpt.get_parameter("cls_embedding.uncond_embedding")
            absent = torch.zeros_like(features_RPE)
            for row_PE, length in zip(absent, lengths, strict=True):
                row_PE[:length] = absent_PE[most - length :]
            features_RPE = torch.cat([features_RPE, absent])
        return Prefix(self.gpt.cls_embedding(features_RPE), tuple(lengths) * (2 if guided else 1))


def _one(folder: Path, name: str | None, pattern: str, key: str) -> Path:
    """The named file of the folder, or the only one that looks like it."""
    files = [p for end in (".pt", ".pth", ".safetensors") for p in sorted(folder.glob(name or pattern + end))]
    files = sorted(set(files))
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "none"
        raise WeightsError(
            f"{folder}: expected one file {name or pattern + '.pt (or .pth, .safetensors)'}, found {found}. "
            f'Name it as "{key}" in config.json'
        )
    return files[0]


ADAPTER = LlamaGen
