"""Which autoregressive model has which adapter, by the name of its class, so that no model is imported to know it."""

from __future__ import annotations

import importlib

from accel.errors import UnknownNameError, UnsupportedError

from .adapter import CheckpointAdapter

#: Class name of the model (config.json's "architectures") -> module whose `ADAPTER` is its adapter class.
_BUILTIN = {
    "Emu3ForConditionalGeneration": "accel.pipelines.autoregressive.emu3",
    "GlmImageForConditionalGeneration": "accel.pipelines.autoregressive.glm_image",
    "JanusForConditionalGeneration": "accel.pipelines.autoregressive.janus",
    "LlamaGen": "accel.pipelines.autoregressive.llamagen",
}
#: Classes of the authors' own code -> the same weights as transformers saves them.
_ELSEWHERE = {
    "Emu3ForCausalLM": "BAAI/Emu3-Gen-hf",
    "MultiModalityCausalLM": "deepseek-community/Janus-Pro-1B or Janus-Pro-7B",
}
_REGISTERED: dict[str, type[CheckpointAdapter]] = {}


def register(class_name: str, adapter: type[CheckpointAdapter]) -> None:
    """Make models of this class known, for the process; takes precedence over the built-in adapters."""
    _REGISTERED[class_name] = adapter


def known() -> list[str]:
    """Class names of the models that an `AutoregressivePipeline` can load."""
    return sorted({*_BUILTIN, *_REGISTERED})


def find(class_name: str) -> type[CheckpointAdapter]:
    """The adapter class for a model class.

    Raises:
        UnsupportedError: the authors' own format of a model that is known in transformers'.
        UnknownNameError: no adapter; names the nearest class and says how to write one.
    """
    if class_name in _REGISTERED:
        return _REGISTERED[class_name]
    if class_name in _BUILTIN:
        return importlib.import_module(_BUILTIN[class_name]).ADAPTER
    if class_name in _ELSEWHERE:
        raise UnsupportedError(
            f"{class_name}: a checkpoint in its authors' own format, which needs their code. Load it as transformers saves "
            f"it: {_ELSEWHERE[class_name]}"
        )
    raise UnknownNameError(
        "autoregressive image model class",
        class_name,
        known(),
        "To support another model, write a subclass of accel.pipelines.autoregressive.adapter.CheckpointAdapter "
        "(accel/pipelines/autoregressive/janus.py is a complete example) and call "
        "accel.pipelines.autoregressive.registry.register(class_name, adapter).",
    )
