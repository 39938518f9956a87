"""The models that come with the package: small, trained on Scenes, in the real formats.

They need no download, so the demo, the tests and the quality benchmarks run on them anywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .scenes_flux import ScenesFluxPipeline

FOLDER = Path(__file__).parent / "scenes-flux"


def load_pipeline(device: Any = None, dtype: Any = None) -> ScenesFluxPipeline:
    """The built-in text-to-image model, a `FluxPipeline` with its own defaults (256 px).

    Args:
        device: default: CUDA if there is one, else CPU.
        dtype: default: bfloat16 on CUDA, float32 on CPU.

    Raises:
        WeightsError: if a file of the model is missing or corrupt; names the file.
    """
    import torch

    from .scenes_flux import ScenesFluxPipeline

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    return ScenesFluxPipeline.load(FOLDER, dtype).to(device)
