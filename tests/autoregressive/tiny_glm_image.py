"""A GLM-Image token stage with random weights, written by transformers' own classes."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import GlmImageConfig, GlmImageForConditionalGeneration, GlmImageProcessor, GPT2Tokenizer

#: The one that does without torchvision, whose name transformers 5.0 gave to it.
ImageProcessor = (
    getattr(transformers, "GlmImageImageProcessorPil", None) or transformers.GlmImageImageProcessor
)

CODES = 32
#: In the order of the published vocabulary: image codes, begin and end of image, spares, text.
VISION = (
    *(f"<|code_{code}|>" for code in range(CODES)),
    "<|begin|>",
    "<|end|>",
    "<|spare_0|>",
    "<|spare_1|>",
)
NAMED = {"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"}
TEMPLATE = (
    "{% for message in messages %}<|user|>{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)

#: Prompts of different lengths.
PROMPTS = ("a red circle", "two", "a blue star left of a red circle and a star")


def tokenizer() -> GPT2Tokenizer:
    special = [*VISION, "<|pad|>", "<|user|>", *NAMED.values()]
    pieces = [*special, *"abcdefghijklmnopqrstuvwxyz0123456789Ġ"]
    tokens = GPT2Tokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[],
        pad_token="<|pad|>",
        bos_token="<|begin|>",
        eos_token="<|end|>",
        extra_special_tokens=NAMED,
        additional_special_tokens=[*VISION[:CODES], "<|user|>"],
        padding_side="left",
    )
    tokens.chat_template = TEMPLATE
    return tokens


def processor() -> GlmImageProcessor:
    return GlmImageProcessor(ImageProcessor(), tokenizer(), chat_template=TEMPLATE)


def model(*, context: int = 512, seed: int = 0) -> GlmImageForConditionalGeneration:
    """Weights large enough that masks and positions matter."""
    tokens = tokenizer()
    config = GlmImageConfig(
        text_config={
            "vocab_size": len(tokens),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": context,
            "vision_vocab_size": len(VISION),
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]},
            "pad_token_id": tokens.pad_token_id,
            "eos_token_id": CODES + 1,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "num_heads": 2,
            "image_size": 32,
            "patch_size": 16,
            "intermediate_size": 16,
        },
        vq_config={"embed_dim": 8, "num_embeddings": CODES, "latent_channels": 16},
        image_token_id=tokens.convert_tokens_to_ids("<|image|>"),
        image_start_token_id=CODES,
        image_end_token_id=CODES + 1,
    )
    torch.manual_seed(seed)
    glm = GlmImageForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in glm.named_parameters():
            if parameter.ndim > 1 and ("language_model" in name or "lm_head" in name):
                parameter.normal_(std=1.5 / parameter[0].numel() ** 0.5, generator=generator)
        glm.get_input_embeddings().weight.normal_(generator=generator)
    return glm.eval()


def save(folder: Path, **sizes: int) -> Path:
    """As `GlmImagePipeline.save_pretrained` lays it out, the two parts that matter here."""
    model(**sizes).save_pretrained(folder / "vision_language_encoder")
    processor().save_pretrained(folder / "processor")
    return folder
