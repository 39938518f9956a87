"""The built-in autoregressive model: `AutoregressivePipeline` as it is, for prompts in the words of Scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from accel.errors import WeightsError
from accel.pipelines.autoregressive import AutoregressivePipeline
from accel.pipelines.autoregressive.loading import class_name

from .words import known_prompts

# transformers does without any of these: it makes up an empty tokenizer and plain sampling.
_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
CLASS = "JanusForConditionalGeneration"


class ScenesJanusPipeline(AutoregressivePipeline):
    """`AutoregressivePipeline` of the built-in model: 128 px, 256 image tokens.

    The folder it loads is a plain `JanusForConditionalGeneration` folder and loads as one, too. Guidance,
    temperature and top-k come from its generation_config.json.
    """

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> ScenesJanusPipeline:
        """Load from a folder, onto the CPU.

        Raises:
            WeightsError: a file is missing or corrupt, or the folder has another model; names the file.
        """
        try:
            for name in _FILES:
                if not (folder / name).is_file():
                    raise WeightsError(f"{folder / name}: file is missing")
            found = class_name(str(folder))
            if found != CLASS:
                raise WeightsError(f"{folder / 'config.json'}: is of a {found}, not of a {CLASS}")
            return cls.from_pretrained(str(folder), dtype=dtype, local_files_only=True)
        except WeightsError as error:
            advice = "Reinstall the package, or train the model: examples/train_scenes_ar.py"
            raise WeightsError(f"{str(error).rstrip('.')}. {advice}") from error

    def _prompts(self, prompt: Any, copies: int) -> list[Any]:
        prompts = super()._prompts(prompt, copies)
        # The user called `__call__`, which torch.no_grad wraps.
        return known_prompts(prompts, self.adapter.tokenizer.get_vocab(), stacklevel=4)
