"""Compiled without breaks, and without a graph per layer or step: the numbers of graphs are held here."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import FAMILIES, make_flux

import accel
from accel.core import compiling
from accel.errors import AccelWarning

FLUX = FAMILIES["flux"]
MERGING = accel.TokenMergingConfig(
    ratio=0.5, schedule=accel.Schedule(dense_first=1, dense_last=0, refresh_every=1)
)
PRUNING = accel.TokenPruningConfig(cycle=(0.3, 0, 1), dense_steps_first=2, dense_steps_last=0)


@pytest.fixture(autouse=True)
def quiet():
    torch.compiler.reset()
    warnings.simplefilter("ignore", AccelWarning)
    yield
    torch.compiler.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def pictures(pipe, sizes, **options):
    return [FLUX.latents(pipe, height=h, width=w, steps=6, **options) for h, w in sizes]


SIZES = [(32, 48), (48, 48), (32, 64)]
#: (method, calls a step) -> graphs of the whole denoiser per size. Dense, and reduced; with two calls a step the
#: plan that the first one makes is taken over by the second one, and with keys and values kept there is a dense step
#: that keeps them.
WHOLE = {
    "balanced": (1, 1),
    "merging": (2, 3),
    "pruning": (3, 3),
}
CONFIGS = {"balanced": "balanced", "merging": MERGING, "pruning": PRUNING}


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("name", WHOLE)
def test_graphs_of_a_whole_model(name, calls):
    pipe, options = make_flux(1, 2), {"guidance": 1.0 if calls == 1 else 3.0}
    sizes = SIZES if calls == 1 else SIZES[:2]
    with accel.accelerate(pipe, CONFIGS[name]):
        expected = pictures(pipe, sizes, **options)
        pipe.transformer.compile(fullgraph=True, dynamic=False, backend="eager")
        torch._dynamo.utils.counters.clear()
        got = pictures(pipe, sizes, **options)
        assert graphs() == WHOLE[name][calls - 1] * len(sizes)
        FLUX.latents(pipe, height=32, width=48, steps=9, **options)
        assert graphs() == WHOLE[name][calls - 1] * len(sizes)  # none per step
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("name", ["merging", "pruning"])
def test_blocks_share_their_graphs_however_many_there_are(name):
    """By `compile=True`; what a block is compiled to does not depend on its layer."""
    counts = []
    for single in (3, 6):
        torch.compiler.reset()
        pipe = make_flux(1, single)
        with accel.accelerate(pipe, CONFIGS[name]):
            expected = pictures(pipe, SIZES[:2], guidance=3.0)
        torch._dynamo.utils.counters.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(compiling.OPTIONS, "backend", "eager")
            with accel.accelerate(pipe, CONFIGS[name], compile=True) as handle:
                assert handle.compiled == "blocks"
                got = pictures(pipe, SIZES[:2], guidance=3.0)
                assert handle.stats.notes == []
        counts.append(graphs())
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())
    assert counts[0] == counts[1]


@pytest.mark.slow
def test_inductor():
    """Rounding apart, what the default backend makes of the hooks is what eager code does."""
    pipe = make_flux(1, 1)
    with accel.accelerate(pipe, MERGING):
        expected = FLUX.latents(pipe, steps=3)
    with accel.accelerate(pipe, MERGING, compile="blocks") as handle:
        got = FLUX.latents(pipe, steps=3)
        assert handle.compiled == "blocks"
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_removed_without_a_trace():
    pipe = make_flux(1, 1)
    plain = FLUX.latents(pipe, steps=3)
    before = {name: set(vars(part)) for name, part in pipe.transformer.named_modules()}
    for how in ("blocks", "whole"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(compiling.OPTIONS, "backend", "eager")
            with accel.accelerate(pipe, MERGING, compile=how) as handle:
                FLUX.latents(pipe, steps=3)
                assert handle.compiled == how
        assert handle.compiled == ""
        assert {name: set(vars(part)) for name, part in pipe.transformer.named_modules()} == before
        assert torch.equal(FLUX.latents(pipe, steps=3), plain)


def test_a_model_that_cannot_be_compiled_says_which_line():
    pipe = make_flux(1, 1)
    norm = pipe.transformer.transformer_blocks[0].norm1
    norm.register_forward_pre_hook(lambda m, a: print(end="") or torch._dynamo.graph_break())
    with accel.accelerate(pipe, MERGING):
        expected = FLUX.latents(pipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(compiling.OPTIONS, "backend", "eager")
        handle = accel.accelerate(pipe, MERGING, compile=True)
    with handle:
        with pytest.warns(
            AccelWarning, match=r"FluxTransformerBlock cannot be compiled at .*test_compile.py:"
        ):
            got = FLUX.latents(pipe)
        assert "it runs as it is" in handle.stats.notes[0]
        assert handle.compiled == ""
        torch.testing.assert_close(got, expected)
        assert torch.equal(FLUX.latents(pipe), got)


def test_what_the_user_has_compiled_stays():
    pipe = make_flux(1, 1)
    pipe.transformer.compile_repeated_blocks(backend="eager")
    theirs = pipe.transformer.transformer_blocks[0]._compiled_call_impl
    with accel.accelerate(pipe, MERGING, compile=True) as handle:
        FLUX.latents(pipe)
        assert handle.stats.notes == ["compile: compiled already: left as it is"]
    assert pipe.transformer.transformer_blocks[0]._compiled_call_impl is theirs


def test_a_bar_shows_what_compiling_takes(capsys):
    pipe = make_flux(1, 1)
    pipe.set_progress_bar_config(disable=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(compiling.OPTIONS, "backend", "eager")
        handle = accel.accelerate(pipe, MERGING, compile=True)
    with handle:
        FLUX.latents(pipe)
        assert "compiling:  50%" in (first := capsys.readouterr().err)
        assert "2/2" in first
        FLUX.latents(pipe)
        assert "compiling" not in capsys.readouterr().err
