"""A pipeline that is called like diffusers', takes milliseconds, and whose image depends on prompt,
noise and steps the way a real one's does: more steps, closer to the same target."""

from __future__ import annotations

import os
import time
import zlib
from types import SimpleNamespace

import torch
from PIL import Image

from accel.evaluation.suites import Prompt, Suite

SUITE = Suite("prompts", [Prompt(i, f"prompt {i}") for i in range(6)])


class Denoiser(torch.nn.Module):
    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        time.sleep(float(os.environ.get("FAKE_STEP_SECONDS", "0")))
        return target - x


class FakePipeline:
    device = torch.device("cpu")

    def __init__(self, size: int = 32) -> None:
        self.transformer = Denoiser()
        self.size = size
        self.calls: list[tuple[list[str], int]] = []

    def __call__(self, prompt, *, generator, output_type="pil", num_inference_steps=20):
        self.calls.append((list(prompt), num_inference_steps))
        images = []
        for text, own in zip(prompt, generator, strict=True):
            x = torch.randn(3, self.size, self.size, generator=own)
            low = torch.Generator().manual_seed(zlib.crc32(text.encode()))
            target = torch.rand(3, 4, 4, generator=low).repeat_interleave(self.size // 4, 1)
            target = target.repeat_interleave(self.size // 4, 2)
            for _ in range(num_inference_steps):
                x = x + 0.25 * self.transformer(x, target)
            array = (x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            images.append(Image.fromarray(array))
        return SimpleNamespace(images=images)


def make() -> FakePipeline:
    return FakePipeline()
