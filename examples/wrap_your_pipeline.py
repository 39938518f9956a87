"""One line on your own pipeline, and what it did.

    python examples/wrap_your_pipeline.py                                              # the built-in model
    python examples/wrap_your_pipeline.py black-forest-labs/FLUX.1-dev "a cat on a sofa"   # yours, on a GPU

Pass a hub id or a folder of any model family that `accel` knows.
"""

import sys

import accel
from accel.generation import load_pipeline

model = sys.argv[1] if len(sys.argv) > 1 else "builtin"
prompt = sys.argv[2] if len(sys.argv) > 2 else "a photo of a red circle left of a blue square"

pipe = load_pipeline(model)  # DiffusionPipeline.from_pretrained, safetensors only

handle = accel.accelerate(pipe, "balanced")  # or a configuration: accel.TokenMergingConfig(ratio=0.5)
pipe(prompt).images[0].save("accelerated.png")  # the pipeline's own call, unchanged
print(handle.stats)

handle.remove()  # bit for bit the old pipeline
pipe(prompt).images[0].save("plain.png")

with accel.accelerate(pipe, "quality"):  # removed at the end of the block, also after an error
    pipe(prompt)
