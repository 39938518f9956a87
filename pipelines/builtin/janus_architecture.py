"""What the built-in autoregressive model is made of: Janus's own classes at a hundredth of the size.

Everything here builds untrained parts; `examples/train_scenes_ar.py` trains them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessor,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAE,
    JanusVQVAEConfig,
    LlamaConfig,
    LlamaTokenizerFast,
)

SIZE = 128  # pixels per side
GRID = 16  # image tokens per side
CODES, CODE_DIM = 512, 16
WIDTH, LAYERS, HEADS, INNER = 256, 6, 4, 512
# The frequency of one of the rotary pairs is then exactly one turn per image row, so that "above" and "in which
# column" are a single phase, not something to be pieced together: 2 pi / 16 = ROPE_THETA ** (-4 / 32).
ROPE_THETA = (GRID / (2 * math.pi)) ** 8
TEXT_TOKENS = 16  # the longest caption is 11 words; the start of the text and of the image make it 13

SPECIAL = {
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "boi_token": "<begin_of_image>",
    "image_token": "<image_placeholder>",
    "eoi_token": "<end_of_image>",
}


def vq_config() -> JanusVQVAEConfig:
    """Three halvings, 128 px to 16 x 16; 32 channels are the fewest that the format's 32 norm groups allow."""
    return JanusVQVAEConfig(
        embed_dim=CODE_DIM,
        num_embeddings=CODES,
        latent_channels=32,
        base_channels=32,
        channel_multiplier=[1, 1, 2, 4],
        num_res_blocks=1,
        num_patches=GRID,
        projection_dim=WIDTH,
        image_token_embed_dim=WIDTH,
        num_hidden_layers=2,
    )


def build_vq() -> JanusVQVAE:
    return JanusVQVAE(vq_config())


def build_tokenizer(words: Sequence[str]) -> LlamaTokenizerFast:
    """A word is a token: byte-pair merges grow each of `words` from its start, letter by letter.

    Letters are tokens, too, for unknown words. Captions must be in lower case.
    """
    pieces = [*SPECIAL.values(), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        for end in range(len(word)):
            merges["▁" + word[:end], word[end]] = None
    pieces += [left + right for left, right in merges]
    return LlamaTokenizerFast(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=list(merges),
        add_bos_token=True,
        model_max_length=TEXT_TOKENS + GRID**2,
        **{name: SPECIAL[name] for name in ("unk_token", "bos_token", "eos_token", "pad_token")},
        extra_special_tokens={name: SPECIAL[name] for name in ("boi_token", "image_token", "eoi_token")},
    )


def build_processor(words: Sequence[str]) -> JanusProcessor:
    return JanusProcessor(
        JanusImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        build_tokenizer(words),
        num_image_tokens=GRID**2,
    )


def build_model(tokenizer: LlamaTokenizerFast) -> JanusForConditionalGeneration:
    """The Llama, the parts that turn image tokens to its width and back, and the VQ model; untrained.

    The vision tower, which Janus reads given images with, is in the format and cannot be left out; it is as
    small as it gets and stays untrained.
    """
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=TEXT_TOKENS + GRID**2,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        rms_norm_eps=1e-6,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = JanusVisionConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=SIZE,
        patch_size=SIZE // GRID,
        mlp_ratio=1.0,
        projection_dim=WIDTH,
        depth=1,
        num_image_tokens=GRID**2,
    )
    image_token = tokenizer.convert_tokens_to_ids(SPECIAL["image_token"])
    config = JanusConfig(
        text_config=text, vision_config=vision, vq_config=vq_config(), image_token_id=image_token
    )
    model = JanusForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        generation_kwargs={"boi_token_id": tokenizer.convert_tokens_to_ids(SPECIAL["boi_token"])},
        do_sample=True,
        guidance_scale=3.0,
    )
    return model
