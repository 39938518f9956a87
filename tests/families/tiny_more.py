"""More families: text appended between the blocks, channels last, experts, language-model blocks, references."""

from __future__ import annotations

import torch
from case import Case
from conftest import randomise
from diffusers import (
    Cosmos2TextToImagePipeline,
    CosmosTransformer3DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    GlmImagePipeline,
    GlmImageTransformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    JoyImageEditPipeline,
    JoyImageEditTransformer3DModel,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
    NucleusMoEImagePipeline,
    NucleusMoEImageTransformer2DModel,
    OmniGenPipeline,
    OmniGenTransformer2DModel,
)
from diffusers.pipelines.joyimage.image_processor import JoyImageEditImageProcessor
from diffusers.pipelines.omnigen.processor_omnigen import OmniGenCollator
from PIL import Image
from tiny_others import BATCH, DIM, AsIs, call_cogview4, common, mask, noise, quiet, texts

NO_TEXT = dict.fromkeys(
    f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3", "_4")
)


def make_hidream():
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[DIM, DIM],
        text_emb_dim=DIM,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(16, 32),
        llama_layers=[0, 1, 0, 1],
    )
    pipe = HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        transformer=randomise(transformer, 0),
        **NO_TEXT,
    )
    pipe.default_sample_size = 16  # it makes all images of about this area
    return quiet(pipe)


def call_hidream(steps, wide, dtype):
    """Square images are not padded, others are."""
    call = {"prompt": None, **common(steps, *((64, 256) if wide else (128, 128)))}
    for kind, seed in (("", 2), ("negative_", 4)):
        call[f"{kind}prompt_embeds_t5"] = noise(BATCH, 5, DIM, seed=seed, dtype=dtype)
        call[f"{kind}prompt_embeds_llama3"] = noise(2, BATCH, 7, DIM, seed=seed + 5, dtype=dtype)
        call[f"{kind}pooled_prompt_embeds"] = noise(BATCH, DIM, seed=seed + 7, dtype=dtype)
    return call


def call_hidream_padded(steps, wide, dtype):
    return call_hidream(steps, not wide, dtype)


class AsLoaded(Kandinsky5Transformer3DModel):
    """Cast as `from_pretrained` casts: some modules stay as they are."""

    def to(self, *args, **kwargs):
        super().to(*args, **kwargs)
        for name, module in self.named_modules():
            if name.rpartition(".")[2] in self._keep_in_fp32_modules:
                module.float()
        return self


def make_kandinsky5():
    transformer = AsLoaded(
        in_visual_dim=4,
        in_text_dim=DIM,
        in_text_dim2=DIM,
        time_dim=16,
        out_visual_dim=4,
        model_dim=32,
        ff_dim=48,
        num_text_blocks=1,
        num_visual_blocks=3,
        axes_dims=(4, 6, 6),
    )
    pipe = Kandinsky5T2IPipeline(
        transformer=randomise(transformer, 0),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipe.resolutions = [(192, 128), (384, 128)]
    return quiet(pipe)


def call_kandinsky5(steps, wide, dtype):
    call = common(steps, 128, 384 if wide else 192)
    for kind, seed in (("", 2), ("negative_", 4)):
        call[f"{kind}prompt_embeds_qwen"] = noise(BATCH, 7, DIM, seed=seed, dtype=dtype)
        call[f"{kind}prompt_embeds_clip"] = noise(BATCH, DIM, seed=seed + 7, dtype=dtype)
        call[f"{kind}prompt_cu_seqlens"] = torch.tensor([0, 7, 14])
    return call


def make_glm_image():
    transformer = GlmImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=DIM,
        time_embed_dim=16,
        condition_dim=4,
        prior_vq_quantizer_codebook_size=16,
    )
    return quiet(
        GlmImagePipeline(
            tokenizer=None,
            processor=None,
            text_encoder=None,
            vision_language_encoder=None,
            vae=None,
            transformer=randomise(transformer, 0),
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
    )


def call_glm_image(steps, wide, dtype):
    prior = torch.randint(16, (BATCH, 192 if wide else 96), generator=torch.Generator().manual_seed(3))
    return {**texts(dtype), "prior_token_ids": prior, **common(steps, 128, 384 if wide else 192)}


def make_nucleus():
    transformer = NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        joint_attention_dim=DIM,
        axes_dims_rope=(4, 6, 6),
        mlp_ratio=6.0,
        dense_moe_strategy="leave_first_block_dense",
        num_experts=4,
        moe_intermediate_dim=16,
        capacity_factors=2.0,
    )
    return quiet(
        NucleusMoEImagePipeline(
            transformer=randomise(transformer, 0),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=None,
            processor=None,
        )
    )


def call_nucleus(steps, wide, dtype):
    masks = {"prompt_embeds_mask": mask(6).bool(), "negative_prompt_embeds_mask": mask(4).bool()}
    return {**texts(dtype), **masks, **common(steps, 128, 384 if wide else 192)}


class TinyOmniGen(OmniGenPipeline):
    """Without the transforms of input images, which need torchvision, and with letters for tokens."""

    def __init__(self, transformer, scheduler, vae, tokenizer):
        DiffusionPipeline.__init__(self)
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae, tokenizer=tokenizer)
        self.vae_scale_factor, self.default_sample_size = 8, 16
        self.multimodal_processor = Letters()


class Letters:
    max_image_size = 1024

    def __call__(self, prompts, input_images, height, width, **options):
        def read(text):
            return {"input_ids": [3 + ord(c) % 29 for c in text], "pixel_values": None, "image_sizes": None}

        return OmniGenCollator()([(read(p), read("bad"), None, [height, width]) for p in prompts])


def make_omnigen():
    transformer = OmniGenTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        num_layers=3,
        pad_token_id=2,
        vocab_size=32,
        pos_embed_max_size=32,
        rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
    )
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return quiet(TinyOmniGen(randomise(transformer, 0), scheduler, AsIs(), None))


def call_omnigen(steps, wide, dtype):
    return {"prompt": ["a circle", "star"], **common(steps, 128, 384 if wide else 192)}


def make_cosmos():
    transformer = CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        mlp_ratio=2.0,
        text_embed_dim=DIM,
        adaln_lora_dim=8,
        max_size=(4, 32, 64),
        concat_padding_mask=False,  # it takes torchvision
    )
    return quiet(
        Cosmos2TextToImagePipeline(
            text_encoder=None,
            tokenizer=None,
            transformer=randomise(transformer, 0),
            vae=None,
            scheduler=FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
            safety_checker=AsIs(),
        )
    )


def call_cosmos(steps, wide, dtype):
    """Its last step has no length."""
    return call_cogview4(max(2, steps), wide, dtype)


class AnySize(JoyImageEditImageProcessor):
    """The pipeline's own sizes begin at a megapixel."""

    def get_default_height_width(self, image, height=None, width=None):
        return height, width


def make_joyimage():
    transformer = JoyImageEditTransformer3DModel(
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=DIM,
        mlp_width_ratio=2.0,
        num_layers=3,
        rope_dim_list=[4, 6, 6],
        rope_type="mrope",
    )
    pipe = JoyImageEditPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AsIs(),
        text_encoder=None,
        tokenizer=None,
        transformer=randomise(transformer, 0),
        processor=None,
    )
    pipe.vae_image_processor = AnySize()
    return quiet(pipe)


def call_joyimage(steps, wide, dtype):
    """With a reference image for each."""
    masks = {"prompt_embeds_mask": mask(7), "negative_prompt_embeds_mask": mask(7)}
    return {
        "image": [Image.linear_gradient("L"), Image.radial_gradient("L")],
        "enable_denormalization": False,
        **texts(dtype),
        **masks,
        **common(steps, 128, 384 if wide else 192),
    }


CASES = {
    "Cosmos 2": Case(make_cosmos, call_cosmos, tokens=96),
    "GLM-Image": Case(make_glm_image, call_glm_image, tokens=96),
    "HiDream": Case(make_hidream, call_hidream, tokens=64),
    "HiDream, padded": Case(make_hidream, call_hidream_padded, tokens=64),
    "JoyImage": Case(make_joyimage, call_joyimage, tokens=96),
    "Kandinsky 5": Case(make_kandinsky5, call_kandinsky5, tokens=96),
    "Nucleus": Case(make_nucleus, call_nucleus, tokens=96),
    "OmniGen": Case(make_omnigen, call_omnigen, tokens=96),
}
