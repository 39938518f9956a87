"""Autoregressive image models: prompts in, images out, token by token or in windows.

from accel.pipelines.autoregressive import AutoregressivePipeline
pipe = AutoregressivePipeline.from_pretrained(folder_or_hub_id).to("cuda")
image = pipe("a red circle left of a blue square").images[0]
"""

from .pipeline import AutoregressiveOutput, AutoregressivePipeline

__all__ = ["AutoregressiveOutput", "AutoregressivePipeline"]
