"""An Emu3 checkpoint with random weights, written by transformers' own classes."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3ImageProcessor,
    Emu3Processor,
    Emu3TextConfig,
    GPT2Tokenizer,
)

NAMED = {
    "pad_token": "<|endoftext|>",
    "bos_token": "<|extra_203|>",
    "eos_token": "<|extra_204|>",
    "image_token": "<image>",
    "boi_token": "<|image start|>",
    "eoi_token": "<|image end|>",
    "image_wrapper_token": "<|image token|>",
    "eof_token": "<|extra_201|>",
}
EOL = "<|extra_200|>"
LETTERS = "abcdefghijklmnopqrstuvwxyz,.0123456789*Ġ"
CODES = 48

#: Prompts of different lengths.
PROMPTS = ("a red circle", "two", "a blue star left of a red circle and a star")


def tokenizer(scattered: bool = False) -> GPT2Tokenizer:
    """Letters, special tokens, then the image codes; `scattered` puts them in another order."""
    codes = [f"<|visual token {code:06d}|>" for code in range(CODES)]
    pieces = [*NAMED.values(), EOL, *LETTERS, *(codes[::-1] if scattered else codes)]
    return GPT2Tokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[],
        **{name: NAMED[name] for name in ("pad_token", "bos_token", "eos_token")},
        extra_special_tokens=dict(list(NAMED.items())[3:]),
        additional_special_tokens=[EOL, *codes],
        padding_side="left",
    )


def model(
    tokens: GPT2Tokenizer, *, context: int = 256, seed: int = 0, **text: int
) -> Emu3ForConditionalGeneration:
    """The VQ model halves the size once. Weights large enough that masks and positions matter."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = Emu3Config(
        text_config=Emu3TextConfig(
            vocab_size=len(tokens),
            max_position_embeddings=context,
            attention_dropout=0.0,
            pad_token_id=tokens.pad_token_id,
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,
            **{**sizes, **text},
        ),
        vq_config={
            "codebook_size": CODES,
            "embed_dim": 4,
            "latent_channels": 4,
            "temporal_downsample_factor": 1,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "hidden_size": 32,
            "attn_resolutions": [],
        },
        vocabulary_map=tokens.get_vocab(),
    )
    torch.manual_seed(seed)
    emu3 = Emu3ForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in emu3.named_parameters():
            if parameter.ndim > 1 and "vqmodel" not in name:
                parameter.normal_(std=1.5 / parameter[0].numel() ** 0.5, generator=generator)
        emu3.get_input_embeddings().weight.normal_(generator=generator)
    return emu3.eval()


def save(folder: Path, *, scattered: bool = False, **sizes: int) -> Path:
    tokens = tokenizer(scattered)
    model(tokens, **sizes).save_pretrained(folder)
    Emu3Processor(image_processor=Emu3ImageProcessor(), tokenizer=tokens).save_pretrained(folder)
    return folder
