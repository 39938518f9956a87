"""What the built-in diffusion model is made of: FLUX's own classes at a hundredth of the size.

Everything here builds untrained parts; `examples/train_scenes_diffusion.py` trains them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

TEXT_TOKENS = 16  # the longest caption is 13 words and an end token
GRID = 32  # image tokens per side at 256 px

# Mean of the logit-normal training times, and the scheduler's `mu`: linear in tokens, as FLUX has it.
BASE_TOKENS, MAX_TOKENS, BASE_SHIFT, MAX_SHIFT = 64, 1024, 0.3, 1.1


def shift_for(size: int) -> float:
    """More noise for larger images: each token there says less about the whole."""
    share = ((size // 8) ** 2 - BASE_TOKENS) / (MAX_TOKENS - BASE_TOKENS)
    return BASE_SHIFT + (MAX_SHIFT - BASE_SHIFT) * share


def build_tokenizers(words: Sequence[str]) -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """Vocabularies of these words in the two real formats; letters are there as well, for unknown words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -100.0), ("▁", -20.0)]
    pieces += [(f"▁{word}", -1.0) for word in words] + [(letter, -20.0) for letter in letters]
    t5 = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TEXT_TOKENS)

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        end_of_word_suffix="</w>",
        initial_alphabet=list(letters),
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(words)] * 2, trainer)
    state = json.loads(bpe.to_str())["model"]
    vocab = dict(state["vocab"])
    for letter in letters:  # a letter that ends a word is a token of its own in CLIP's format
        vocab.setdefault(f"{letter}</w>", len(vocab))
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]
    clip = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_TOKENS)
    return clip, t5


def build_text_encoders(clip: CLIPTokenizer, t5: T5TokenizerFast) -> tuple[CLIPTextModel, T5EncoderModel]:
    clip_model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip),
            hidden_size=128,
            intermediate_size=256,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TEXT_TOKENS,
            bos_token_id=clip.bos_token_id,
            eos_token_id=clip.eos_token_id,
            pad_token_id=clip.pad_token_id,
        )
    )
    t5_model = T5EncoderModel(
        T5Config(
            vocab_size=len(t5),
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=4,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=t5.pad_token_id,
            eos_token_id=t5.eos_token_id,
        )
    )
    return clip_model, t5_model


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=256,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def build_transformer() -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        axes_dims_rope=(4, 30, 30),
    )
    # adaLN-zero (Peebles & Xie 2022): every block starts as the identity.
    for name, module in model.named_modules():
        if name.endswith((".norm.linear", ".norm1.linear", ".norm1_context.linear", "norm_out.linear")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(model.proj_out.weight)
    return model


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        shift=1.0,
        use_dynamic_shifting=True,
        base_image_seq_len=BASE_TOKENS,
        max_image_seq_len=MAX_TOKENS,
        base_shift=BASE_SHIFT,
        max_shift=MAX_SHIFT,
    )


def assemble(parts: Path, transformer_state: dict[str, torch.Tensor]) -> FluxPipeline:
    """The pipeline in bfloat16, from a folder with the trained text side and VAE, and the transformer's weights."""
    transformer = build_transformer()
    transformer.load_state_dict(transformer_state)
    pipe = FluxPipeline(
        scheduler=build_scheduler(),
        vae=AutoencoderKL.from_pretrained(parts / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(parts / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(parts / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(parts / "text_encoder_2"),
        tokenizer_2=T5TokenizerFast.from_pretrained(parts / "tokenizer_2"),
        transformer=transformer,
    )
    return pipe.to(dtype=torch.bfloat16)
