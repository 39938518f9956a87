"""On a CUDA device: recorded and compiled calls give the pictures that eager ones give."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import FAMILIES, make_flux

import accel

pytestmark = pytest.mark.gpu

FLUX = FAMILIES["flux"]
MERGING = accel.TokenMergingConfig(
    ratio=0.5, schedule=accel.Schedule(dense_first=1, dense_last=0, refresh_every=2)
)
PRUNING = accel.TokenPruningConfig(cycle=(0.3, 0, 1), dense_steps_first=2, dense_steps_last=0)
CONFIGS = {
    "plain": accel.ForecastConfig(dense_steps_first=1000),
    "balanced": "balanced",
    "merging": MERGING,
    "few-step": "few-step",
    "pruning": PRUNING,
    "half of guidance": accel.ForecastConfig(schedule=accel.Schedule(cycle=(0, 1), guidance_every=2)),
}


@pytest.fixture(autouse=True)
def quiet():
    warnings.simplefilter("ignore")
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def on_gpu():
    return make_flux(1, 2).to("cuda")


def picture(pipe, **options):
    call = FLUX.call(**{"height": 64, "width": 96, "steps": 8, "guidance": 3.0, **options})
    return pipe(**{k: v.to("cuda") if isinstance(v, torch.Tensor) else v for k, v in call.items()}).images


def close(a, b, tolerance):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("name", CONFIGS)
def test_recorded_calls_give_the_same_pictures(name):
    pipe, sizes = on_gpu(), [(64, 96), (64, 96), (96, 96), (64, 96)]
    with accel.accelerate(pipe, CONFIGS[name]):
        expected = [picture(pipe, height=h, width=w) for h, w in sizes]
    with accel.accelerate(pipe, CONFIGS[name], compile="graphs") as handle:
        for (h, w), one in zip(sizes, expected, strict=True):
            close(picture(pipe, height=h, width=w), one, 1e-4)
        assert handle.stats.notes == []
        assert len(handle._method().run.compilation.graphs) > 0
        first, second = picture(pipe), picture(pipe)
        assert torch.equal(first, second)
    torch.cuda.synchronize()


def test_a_model_that_waits_for_the_device_runs_as_it_is():
    config = accel.TokenMergingConfig(
        matching=accel.Matching(threshold=0.2), dense_steps_first=2, dense_steps_last=0
    )
    pipe, stream = on_gpu(), torch.cuda.current_stream()
    with accel.accelerate(pipe, config):
        expected = picture(pipe)
    with accel.accelerate(pipe, config, compile="graphs") as handle:
        for _ in range(3):
            close(picture(pipe), expected, 1e-4)
        print(handle.stats.notes)
        assert handle.stats.notes[0].startswith("no CUDA graph: ")
        assert "engine.py" in handle.stats.notes[0]
        assert len(handle._method().run.compilation.graphs) == 2  # recording goes on after one was broken off
    assert torch.cuda.current_stream() == stream
    torch.rand(2, device="cuda")  # what a recording that breaks off may leave unusable
    torch.cuda.get_rng_state()
    torch.cuda.empty_cache()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("balanced", {"mode": "reduce-overhead"}),
        ("merging", {"mode": "reduce-overhead"}),
        ("pruning", {"mode": "reduce-overhead"}),
    ],
)
def test_inductors_graphs_with_two_calls_a_step(name, options):
    pipe = on_gpu()
    with accel.accelerate(pipe, CONFIGS[name]):
        expected = picture(pipe)
        pipe.transformer.compile(fullgraph=True, dynamic=False, **options)
        for _ in range(3):
            close(picture(pipe), expected, 1e-2)


@pytest.mark.parametrize("name", ["merging", "pruning"])
def test_blocks_compiled_and_recorded(name):
    pipe = on_gpu()
    with accel.accelerate(pipe, CONFIGS[name]):
        expected = picture(pipe)
    with accel.accelerate(pipe, CONFIGS[name], compile=True) as handle:
        for _ in range(4):
            close(picture(pipe), expected, 1e-2)
        print(name, handle.compiled, len(handle._method().run.compilation.graphs), handle.stats.notes)
        assert handle.compiled == "blocks+graphs"
