"""A Janus checkpoint with random weights, written as transformers writes it, in well under a second.

No JanusProcessor: it needs torchvision, which is optional here. Its files are the tokenizer's and a JSON.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    LlamaTokenizerFast,
)

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<begin_of_image>", "<image_placeholder>", "<end_of_image>")
WORDS = ("a", "red", "blue", "circle", "star", "left", "of", "two", "and")
MEAN, STD = (0.5, 0.4, 0.6), (0.5, 0.25, 0.5)

#: Prompts of different lengths, all of known words.
PROMPTS = ("a red circle", "two", "a blue star left of a red circle and a star", "blue circle and star")


def tokenizer() -> LlamaTokenizerFast:
    pieces = [*SPECIAL, "▁", *sorted({letter for word in WORDS for letter in word})]
    merges = {("▁" + word[:end], word[end]): None for word in WORDS for end in range(len(word))}
    pieces += [left + right for left, right in merges]
    names = ("unk_token", "bos_token", "eos_token", "pad_token", "boi_token", "image_token", "eoi_token")
    named = dict(zip(names, SPECIAL, strict=True))
    return LlamaTokenizerFast(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=list(merges),
        add_bos_token=True,
        **{name: named[name] for name in names[:4]},
        extra_special_tokens={name: named[name] for name in names[4:]},
    )


def model(
    *,
    grid: int = 4,
    codes: int = 64,
    width: int = 32,
    layers: int = 2,
    heads: int = 4,
    key_value_heads: int = 2,
    context: int = 64,
    seed: int = 0,
) -> JanusForConditionalGeneration:
    """Weights large enough that every part matters: with the usual 0.02, attention is flat and hides wrong
    masks and positions."""
    torch.manual_seed(seed)
    tokens = tokenizer()
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokens),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            max_position_embeddings=context,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=2 * grid,
            patch_size=2,
            mlp_ratio=1.0,
            projection_dim=width,
            depth=1,
            num_image_tokens=grid**2,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=codes,
            latent_channels=32,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            num_patches=grid,
            projection_dim=width,
            image_token_embed_dim=width,
        ),
        image_token_id=tokens.convert_tokens_to_ids("<image_placeholder>"),
    )
    janus = JanusForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in janus.named_parameters():
            if parameter.ndim > 1 and "vqmodel" not in name:
                parameter.normal_(std=1.5 / parameter[0].numel() ** 0.5, generator=generator)
        for embedding in (janus.get_input_embeddings().weight, janus.model.generation_embeddings.weight):
            embedding.normal_(generator=generator)
    janus.generation_config = GenerationConfig(
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        generation_kwargs={"boi_token_id": tokens.convert_tokens_to_ids("<begin_of_image>")},
        do_sample=True,
        guidance_scale=3.0,
    )
    return janus.eval()


def save(folder: Path, janus: JanusForConditionalGeneration) -> Path:
    janus.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    image_processor = {
        "image_processor_type": "JanusImageProcessor",
        "image_mean": MEAN,
        "image_std": STD,
        "rescale_factor": 1 / 255,
        "size": {"height": 8, "width": 8},
    }
    config = {"processor_class": "JanusProcessor", "num_image_tokens": 16, "image_processor": image_processor}
    (folder / "processor_config.json").write_text(json.dumps(config))
    return folder
