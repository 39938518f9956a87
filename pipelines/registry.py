"""Which denoiser has which adapter, by the name of its class, so that no model is imported to know it."""

from __future__ import annotations

import importlib

from torch import nn

from accel.core.capability import Adapter

#: Class name -> module whose `ADAPTER` describes it.
_BUILTIN = {
    "AuraFlowTransformer2DModel": "accel.pipelines.diffusion.auraflow",
    "BriaFibo2Transformer2DModel": "accel.pipelines.diffusion.fibo2",
    "BriaFiboTransformer2DModel": "accel.pipelines.diffusion.fibo",
    "BriaTransformer2DModel": "accel.pipelines.diffusion.bria",
    "ChromaTransformer2DModel": "accel.pipelines.diffusion.chroma",
    "CogView3PlusTransformer2DModel": "accel.pipelines.diffusion.cogview3",
    "CogView4Transformer2DModel": "accel.pipelines.diffusion.cogview4",
    "CosmosTransformer3DModel": "accel.pipelines.diffusion.cosmos",
    "DiTTransformer2DModel": "accel.pipelines.diffusion.dit",
    "ErnieImageTransformer2DModel": "accel.pipelines.diffusion.ernie",
    "Flux2Transformer2DModel": "accel.pipelines.diffusion.flux2",
    "Flux3Transformer2DModel": "accel.pipelines.diffusion.flux3",
    "FluxTransformer2DModel": "accel.pipelines.diffusion.flux",
    "GlmImageTransformer2DModel": "accel.pipelines.diffusion.glm_image",
    "HiDreamImageTransformer2DModel": "accel.pipelines.diffusion.hidream",
    "HunyuanDiT2DModel": "accel.pipelines.diffusion.hunyuan_dit",
    "HunyuanImageTransformer2DModel": "accel.pipelines.diffusion.hunyuanimage",
    "Ideogram4Transformer2DModel": "accel.pipelines.diffusion.ideogram4",
    "JoyImageEditPlusTransformer3DModel": "accel.pipelines.diffusion.joyimage_plus",
    "JoyImageEditTransformer3DModel": "accel.pipelines.diffusion.joyimage",
    "Kandinsky5Transformer3DModel": "accel.pipelines.diffusion.kandinsky5",
    "Krea2Transformer2DModel": "accel.pipelines.diffusion.krea2",
    "LongCatImageTransformer2DModel": "accel.pipelines.diffusion.longcat",
    "Lumina2Transformer2DModel": "accel.pipelines.diffusion.lumina2",
    "LuminaNextDiT2DModel": "accel.pipelines.diffusion.lumina_next",
    "NucleusMoEImageTransformer2DModel": "accel.pipelines.diffusion.nucleus",
    "OmniGenTransformer2DModel": "accel.pipelines.diffusion.omnigen",
    "OvisImageTransformer2DModel": "accel.pipelines.diffusion.longcat",
    "PixArtTransformer2DModel": "accel.pipelines.diffusion.pixart",
    "PRXTransformer2DModel": "accel.pipelines.diffusion.prx",
    "QwenImage21Transformer2DModel": "accel.pipelines.diffusion.qwenimage21",
    "QwenImageTransformer2DModel": "accel.pipelines.diffusion.qwenimage",
    "SanaTransformer2DModel": "accel.pipelines.diffusion.sana",
    "SD3Transformer2DModel": "accel.pipelines.diffusion.sd3",
    "StableCascadeUNet": "accel.pipelines.diffusion.stable_cascade",
    "UNet2DConditionModel": "accel.pipelines.diffusion.unet",
    "ZImageTransformer2DModel": "accel.pipelines.diffusion.zimage",
}
_REGISTERED: dict[str, Adapter] = {}


def register(class_name: str, adapter: Adapter) -> None:
    """Make denoisers of this class known, for the process; takes precedence over the built-in adapters."""
    _REGISTERED[class_name] = adapter


def known() -> list[str]:
    """Class names of the denoisers that can be accelerated."""
    return sorted({*_BUILTIN, *_REGISTERED})


def adapters() -> dict[str, Adapter]:
    """What is known, by class name; imports every family's file (not its model)."""
    built_in = {name: importlib.import_module(module).ADAPTER for name, module in _BUILTIN.items()}
    return dict(sorted({**built_in, **_REGISTERED}.items(), key=lambda item: item[0].lower()))


def find(denoiser: nn.Module) -> Adapter:
    """The adapter of a denoiser, by the names of its class and base classes. One that nobody has described gets an
    adapter that declares nothing but a prediction: enough for forecasts."""
    for cls in type(denoiser).__mro__:
        if cls.__name__ in _REGISTERED:
            return _REGISTERED[cls.__name__]
        if cls.__name__ in _BUILTIN:
            return importlib.import_module(_BUILTIN[cls.__name__]).ADAPTER
    return Adapter(type(denoiser).__name__)
