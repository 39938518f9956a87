"""LlamaGen state dicts with random weights under the published key names, and the folders they are put in.

Names, shapes and what lies beside the weights in the files: github.com/FoundationVision/LlamaGen.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

WIDTH, HEADS, LAYERS, FEED, CODES = 32, 4, 2, 48, 64
CLASSES, CAPTION, PREFIX = 10, 24, 6
CHANNELS, MULTIPLES, LATENT = 32, (1, 2), 16
WORDS = ("a", "red", "blue", "circle", "star", "left", "of", "two", "and")

#: Captions of different lengths, end token included: 4, 2 and 6, all that the tiny model reads.
PROMPTS = ("a red circle", "two", "a blue star and circle")


def _random(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight") or (".norm" in name and name.endswith("weight")):
            state[name] = 1 + 0.2 * noise
        elif "embedding" in name or len(shape) == 1:
            state[name] = noise
        else:
            state[name] = noise * 1.5 / (noise[0].numel() ** 0.5)
    return state


def gpt(text: bool, seed: int = 0) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (CODES, WIDTH)}
    if text:
        shapes["cls_embedding.uncond_embedding"] = (PREFIX, CAPTION)
        shapes["cls_embedding.cap_proj.fc1.weight"] = (WIDTH, CAPTION)
        shapes["cls_embedding.cap_proj.fc2.weight"] = (WIDTH, WIDTH)
    else:
        shapes["cls_embedding.embedding_table.weight"] = (CLASSES + 1, WIDTH)
    for layer in range(LAYERS):
        shapes |= {
            f"layers.{layer}.attention.wqkv.weight": (3 * WIDTH, WIDTH),
            f"layers.{layer}.attention.wo.weight": (WIDTH, WIDTH),
            f"layers.{layer}.feed_forward.w1.weight": (FEED, WIDTH),
            f"layers.{layer}.feed_forward.w3.weight": (FEED, WIDTH),
            f"layers.{layer}.feed_forward.w2.weight": (WIDTH, FEED),
            f"layers.{layer}.attention_norm.weight": (WIDTH,),
            f"layers.{layer}.ffn_norm.weight": (WIDTH,),
        }
    return _random({**shapes, "norm.weight": (WIDTH,), "output.weight": (CODES, WIDTH)}, seed)


def vq(seed: int = 1) -> dict[str, Tensor]:
    """One residual block per resolution, so two in the decoder; with some of the encoder's keys."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, out: int, into: int, size: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into, size, size), (out,)

    def norm(name: str, channels: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (channels,)

    def residual(name: str, into: int, out: int) -> None:
        norm(f"{name}.norm1", into)
        conv(f"{name}.conv1", out, into, 3)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out, 3)
        if into != out:
            conv(f"{name}.nin_shortcut", out, into, 1)

    def attention(name: str, channels: int) -> None:
        norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", channels, channels, 1)

    shapes["quantize.embedding.weight"] = (CODES, 8)
    shapes["quantize.codebook_used"] = (65536,)
    conv("encoder.conv_in", CHANNELS, 3, 3)
    conv("quant_conv", 8, LATENT, 1)
    conv("post_quant_conv", LATENT, 8, 1)
    into = CHANNELS * MULTIPLES[-1]
    conv("decoder.conv_in", into, LATENT, 3)
    residual("decoder.mid.0", into, into)
    attention("decoder.mid.1", into)
    residual("decoder.mid.2", into, into)
    for stage, multiple in enumerate(reversed(MULTIPLES)):
        out = CHANNELS * multiple
        for block in range(2):
            residual(f"decoder.conv_blocks.{stage}.res.{block}", into, out)
            into = out
            if stage == 0:
                attention(f"decoder.conv_blocks.{stage}.attn.{block}", out)
        if stage + 1 < len(MULTIPLES):
            conv(f"decoder.conv_blocks.{stage}.upsample.conv", out, out, 3)
    norm("decoder.norm_out", into)
    conv("decoder.conv_out", 3, into, 3)
    return _random(shapes, seed)


def _save_encoder(folder: Path) -> None:
    pieces = ["<pad>", "</s>", *WORDS]
    core = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>").save_pretrained(
        folder
    )
    torch.manual_seed(2)
    config = T5Config(
        vocab_size=len(pieces), d_model=CAPTION, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    encoder = T5EncoderModel(config)
    with torch.no_grad():
        encoder.shared.weight.normal_()
    encoder.save_pretrained(folder)


def save(folder: Path, *, text: bool = False, image_size: int = 8, seed: int = 0) -> Path:
    """Files as training leaves them: weights under "model", other things beside."""
    beside = {"steps": 3, "args": argparse.Namespace(gpt_model="tiny")}
    name = "t2i_tiny.pt" if text else "c2i_tiny.pt"
    torch.save({"model": gpt(text, seed), **beside}, folder / name)
    torch.save({"model": vq(), "ema": {}, **beside}, folder / "vq_tiny.pt")
    settings = {"architectures": ["LlamaGen"], "heads": HEADS, "image_size": image_size}
    (folder / "config.json").write_text(json.dumps(settings))
    if text:
        _save_encoder(folder / "t5")
    return folder
