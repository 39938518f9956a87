"""Endless encoded scenes for fine-tuning the built-in diffusion model: drawn by worker threads, rendered and encoded
on the training device, each batch of the pool used a few times with fresh noise."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline
from scenes_data import captions
from scenes_text import encode
from torch import Tensor

from accel.evaluation.geneval.metadata import Metadata
from accel.evaluation.scenes import SCALES, Scenes, render, sample_scenes
from accel.evaluation.scenes.prompts import DETAIL_TASKS, draw_detail

DETAIL_SHARE = 0.25  # of the textured world's pictures
CHUNK = 64  # scenes rendered and encoded at once
EMPTY_SHARE = 0.1  # of the captions, for guidance


def draw_lines(rng: np.random.Generator, count: int, world: str) -> list[Metadata]:
    """Metadata of training combinations; of the textured world, some with a word of scale."""
    detailed = int(rng.binomial(count, DETAIL_SHARE)) if world == "textured" else 0
    return captions(rng, count - detailed) + [
        draw_detail(str(rng.choice(DETAIL_TASKS)), str(rng.choice(SCALES)), rng, "train")
        for _ in range(detailed)
    ]


def draw_captions(rng: np.random.Generator, count: int, world: str) -> list[str]:
    return [line.prompt for line in draw_lines(rng, count, world)]


def draw_scenes(seed: list[int], count: int, world: str) -> tuple[list[str], Scenes]:
    """Captions, some of them empty, and scenes."""
    rng = np.random.default_rng(seed)
    lines = draw_lines(rng, count, world)
    texts = ["" if rng.random() < EMPTY_SHARE else line.prompt for line in lines]
    return texts, sample_scenes(lines, rng, world)


class Latents:
    """Batches of (latents (B, N, 16), T5 features (B, 16, 128), CLIP's pooled features (B, 128)).

    Args:
        pool: the threads that draw.
        pipe: the built-in pipeline, on the training device; its autoencoder and text encoders are used as they are.
        world: of `accel.evaluation.scenes.WORLDS`.
        count: scenes encoded at once.
        reuse: how often each is used.
    """

    def __init__(self, pool: Workers, pipe: FluxPipeline, world: str, seed: int, count: int, reuse: int):
        self.pool, self.pipe, self.world = pool, pipe, world
        self.seed, self.count, self.reuse = seed, count, reuse
        self.device = pipe.transformer.device
        self.drawn = pool.stream(world, seed, count)
        self.rng = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def _fill(self, size: int) -> list[Tensor]:
        texts, scenes = next(self.drawn)
        vae: AutoencoderKL = self.pipe.vae
        encoders = [getattr(self.pipe, f"text_encoder{n}") for n in ("", "_2")]
        tokenizers = [getattr(self.pipe, f"tokenizer{n}") for n in ("", "_2")]
        parts = []
        for start in range(0, self.count, CHUNK):
            images = render(scenes[start : start + CHUNK].to(self.device), size).to(vae.dtype) * 2 - 1
            latents = vae.encode(images).latent_dist.mean.float()
            latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
            packed = FluxPipeline._pack_latents(latents, *latents.shape)
            parts.append((packed, *encode(*encoders, *tokenizers, texts[start : start + CHUNK], self.device)))
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # what fails here is to say so here
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    def batches(self, size: int, batch: int) -> Iterator[list[Tensor]]:
        while True:
            columns = self._fill(size)
            for _ in range(self.reuse):
                order = torch.randperm(self.count, generator=self.rng).to(self.device)
                for start in range(0, self.count - batch + 1, batch):
                    yield [column[order[start : start + batch]] for column in columns]


class Workers:
    """Threads that draw scenes ahead of their use; 0: none, they are drawn when they are needed."""

    def __init__(self, threads: int):
        self.pool = ThreadPoolExecutor(threads) if threads else None

    def stream(self, world: str, seed: int, count: int) -> Iterator[tuple[list[str], Scenes]]:
        index, ahead = 0, []
        while True:
            if self.pool is None:
                yield draw_scenes([seed, index], count, world)
                index += 1
                continue
            while len(ahead) < 2:
                ahead.append(self.pool.submit(draw_scenes, [seed, index], count, world))
                index += 1
            yield ahead.pop(0).result()

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
