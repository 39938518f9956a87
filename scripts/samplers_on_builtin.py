"""`balanced` under the samplers that FLUX can take, on the built-in model: distance to the plain picture of the same
sampler. Prints the second table of docs/measured/schedulers.md.

    python scripts/samplers_on_builtin.py --prompts 8
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings

import diffusers
import torch

import accel
from accel.evaluation.metrics.pixel import psnr
from accel.evaluation.scenes.prompts import prompts as scenes
from accel.pipelines.builtin import load_pipeline

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SAMPLERS = {
    "FlowMatchEulerDiscreteScheduler": {},
    "FlowMatchEulerDiscreteScheduler, stochastic_sampling": {"stochastic_sampling": True},
    "FlowMatchLCMScheduler": {},
    "FlowMatchHeunDiscreteScheduler": {},
    "UniPCMultistepScheduler, flow": FLOW,
    "DPMSolverMultistepScheduler, flow": FLOW,
    "DPMSolverMultistepScheduler, flow, sde-dpmsolver++": {**FLOW, "algorithm_type": "sde-dpmsolver++"},
    "DEISMultistepScheduler, flow": FLOW,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--size", type=int, default=128)
    options = parser.parse_args()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    pipe = load_pipeline("cpu", torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompts = [one.prompt for one in scenes(per_task=2)][: options.prompts]
    own = pipe.scheduler

    def make(prompt: str, seed: int) -> torch.Tensor:
        # FLUX's pipeline gives its generator to no step: what those draw is torch's own.
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        size = {"height": options.size, "width": options.size}
        return pipe(
            prompt, num_inference_steps=options.steps, generator=generator, output_type="pt", **size
        ).images

    print(f"| sampler | PSNR of `balanced` to plain, mean of {len(prompts)} | least |\n|---|---|---|")
    for name, settings in SAMPLERS.items():
        cls = getattr(diffusers, name.split(",")[0])
        pipe.scheduler = cls.from_config({**own.config, **settings})
        try:
            plain = [make(prompt, seed) for seed, prompt in enumerate(prompts)]
        except (TypeError, ValueError) as error:
            print(f"| {name} | FLUX cannot take it: {str(error).splitlines()[0][:90]} | |")
            continue
        try:
            with accel.accelerate(pipe, "balanced"):
                fast = [make(prompt, seed) for seed, prompt in enumerate(prompts)]
        except accel.AccelError as error:
            print(f"| {name} | refused: {str(error).split(':')[0]} | |")
            continue
        values = [float(psnr(a, b)) for a, b in zip(fast, plain, strict=True)]
        print(f"| {name} | {statistics.mean(values):.1f} dB | {min(values):.1f} dB |", flush=True)


if __name__ == "__main__":
    main()
