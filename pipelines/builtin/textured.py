"""The textured world of the built-in diffusion model: a side-car of low-rank changes, merged into a loaded pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from accel.core import sidecar
from accel.errors import WeightsError

from .scenes_flux import ScenesFluxPipeline

KIND = "textured"
FILE = Path(__file__).parent / "scenes-flux" / "textured.safetensors"
WORDS = ("small", "tiny", "thin")


def add_to(pipe: ScenesFluxPipeline, file: Path = FILE) -> None:
    """Change the pipeline's transformer and the letters of its text encoders, for good.

    Raises:
        WeightsError: the file is missing or corrupt, or was trained for another model.
    """
    try:
        car = sidecar.read(file, KIND)
        car.merge(pipe.transformer)
        spell(pipe, car.extra)
    except WeightsError as error:
        advice = "Train it: examples/train_scenes_textured.py"
        raise WeightsError(f"{str(error).rstrip('. ')}. {advice}") from error


def spell(pipe: ScenesFluxPipeline, letters: Mapping[str, torch.Tensor]) -> None:
    """Put in the rows of the embedding tables that spell `WORDS`.

    Raises:
        WeightsError: a table lacks them.
    """
    for name in ("text_encoder", "text_encoder_2"):
        index, rows = letters.get(f"{name}.index"), letters.get(f"{name}.rows")
        table = getattr(pipe, name).get_input_embeddings().weight
        if index is None or rows is None or int(index.max()) >= table.shape[0]:
            raise WeightsError(f"the side-car has no letters for {name}")
        with torch.no_grad():
            table[index.to(table.device)] = rows.to(table.device, table.dtype)
    pipe.spelt = frozenset(WORDS)
