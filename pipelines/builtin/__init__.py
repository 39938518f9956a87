"""The models that come with the package: small, trained on Scenes, in the real formats.

They need no download, so the demo, the tests and the quality benchmarks run on them anywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .scenes_flux import ScenesFluxPipeline
    from .scenes_janus import ScenesJanusPipeline

FOLDER = Path(__file__).parent / "scenes-flux"
AUTOREGRESSIVE_FOLDER = Path(__file__).parent / "scenes-janus"
#: For `adapter=`: what the model, of either world, has learnt to do with few tokens.
UPCYCLED = FOLDER / "chunking.safetensors"


def load_pipeline(
    device: Any = None, dtype: Any = None, world: str = "flat", distilled: bool = False
) -> ScenesFluxPipeline:
    """The built-in text-to-image model, a `FluxPipeline` with its own defaults (256 px).

    Args:
        device: default: CUDA if there is one, else CPU.
        dtype: default: bfloat16 on CUDA, float32 on CPU.
        world: "flat", or "textured": the same model changed by a side-car, so that the same prompts get patterned
            grounds and shapes, and three more words mean something: small, tiny and thin.
        distilled: the same model changed by another side-car, so that it draws in four steps of one call, without
            guidance (`ScenesTurboPipeline`); of the flat world alone.

    Raises:
        WeightsError: if a file of the model is missing or corrupt; names the file.
        ConfigError: an unknown world, or the textured one of the distilled model.
    """
    from accel.errors import ConfigError

    if world not in ("flat", "textured"):
        raise ConfigError(f"world must be 'flat' or 'textured', got {world!r}")
    if distilled and world != "flat":
        raise ConfigError(f"distilled=True goes with world='flat', got {world!r}")
    device, dtype = _defaults(device, dtype)
    if distilled:
        from . import turbo

        pipe = load_folder(FOLDER, dtype, turbo.ScenesTurboPipeline)
        turbo.add_to(pipe)
        return pipe.to(device)
    pipe = load_folder(FOLDER, dtype)
    if world == "textured":
        from . import textured

        textured.add_to(pipe)
    return pipe.to(device)


def load_folder(folder: Path, dtype: Any, cls: type[ScenesFluxPipeline] | None = None) -> ScenesFluxPipeline:
    """A model like the built-in one from a folder, onto the CPU; of another class of pipelines than its own, if given.

    Raises:
        WeightsError: a file is missing or corrupt; names the file.
    """
    from accel.errors import WeightsError
    from accel.pipelines.folders import AGAIN, load_as

    from .scenes_flux import ScenesFluxPipeline

    try:
        return load_as(cls or ScenesFluxPipeline, folder, dtype)
    except WeightsError as error:
        advice = "Reinstall the package, or train the model: examples/train_scenes_diffusion.py"
        raise WeightsError(f"{str(error).removesuffix(AGAIN).rstrip('. ')}. {advice}") from error


def load_autoregressive(device: Any = None, dtype: Any = None) -> ScenesJanusPipeline:
    """The built-in autoregressive model, an `AutoregressivePipeline` (128 px, 256 image tokens).

    Args:
        device: default: CUDA if there is one, else CPU.
        dtype: default: bfloat16 on CUDA, float32 on CPU.

    Raises:
        WeightsError: if a file of the model is missing or corrupt; names the file.
    """
    from .scenes_janus import ScenesJanusPipeline

    device, dtype = _defaults(device, dtype)
    pipe = ScenesJanusPipeline.load(AUTOREGRESSIVE_FOLDER, dtype)
    pipe.to(device)
    return pipe


def _defaults(device: Any, dtype: Any) -> tuple[Any, Any]:
    import torch

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return device, dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
