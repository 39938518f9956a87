"""CUDA graphs of a denoiser's calls: what is copied in and cloned out, recorded anew, dropped and refused.

The recorder is a tape that replays on the CPU; that the real one does the same is for `pytest -m gpu`.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict

import pytest
import torch
from conftest import FAMILIES, make_flux
from recorder import Tape

import accel
from accel.core import compiling
from accel.errors import AccelWarning, ConfigError, UnsupportedError

FLUX = FAMILIES["flux"]
MERGING = accel.TokenMergingConfig(
    ratio=0.5, schedule=accel.Schedule(dense_first=1, dense_last=0, refresh_every=2)
)
PRUNING = accel.TokenPruningConfig(cycle=(0.3, 0, 1), dense_steps_first=2)
CONFIGS = {
    "plain": accel.ForecastConfig(dense_steps_first=1000),
    "balanced": "balanced",
    "merging": MERGING,
    "windows": accel.TokenMergingConfig(groups="windows", dense_steps_first=2),
    "groups": accel.TokenMergingConfig(
        ratio=0.5,
        refresh_layers=(2,),
        scope="block",
        drift=0.1,
        dense_steps_first=1,
        matching=accel.Matching(destinations="random"),
    ),
    "pruning": PRUNING,
    "pruning without keys": accel.TokenPruningConfig(cycle=(0.3, 0.5), keys_values="none"),
    "chunking": accel.DynamicChunkingConfig(depth=(0.6, 1.4), dense_steps_first=2),
    "kept tokens": accel.DynamicChunkingConfig.dc_dit(router="predictability"),
    "branches in chunks": accel.DynamicChunkingConfig(unconditional=0.3),
    "half of guidance": accel.ForecastConfig(schedule=accel.Schedule(cycle=(0, 1), guidance_every=2)),
}


@pytest.fixture
def tape(monkeypatch):
    """Models on the CPU are taken for ones on a GPU with this recorder."""
    tape = Tape()
    monkeypatch.setattr(compiling, "_no_graphs", lambda modules: None)
    monkeypatch.setattr(compiling, "Cuda", lambda device: tape)
    warnings.simplefilter("ignore", AccelWarning)
    return tape


def graphs_of(handle):
    return handle._method().run.compilation.graphs


@pytest.mark.parametrize("name", CONFIGS)
def test_replayed_calls_give_the_same_pictures(tape, name):
    pipe, config = make_flux(1, 2), CONFIGS[name]
    sizes = [(32, 48), (32, 48), (48, 48), (32, 48)]
    guidance = 1.0 if name in ("balanced", "windows") else 3.0  # one call a step, or two
    options = [{"height": h, "width": w, "steps": 8, "guidance": guidance} for h, w in sizes]
    with accel.accelerate(pipe, config) as handle:
        expected = [FLUX.latents(pipe, **one) for one in options]
        shares = handle.stats.share
    with accel.accelerate(pipe, config, compile="graphs") as handle:
        got = [FLUX.latents(pipe, **one) for one in options]
        assert handle.stats.share == shares
        assert handle.stats.notes == []
        graphs = graphs_of(handle)
        assert len(graphs) >= 1
        replays, records = tape.replays, tape.records
        again = FLUX.latents(pipe, **options[-1])
        calls = sum(step.calls for step in handle.stats.steps if step.computed)
        assert tape.replays - replays == calls
        assert tape.records == records  # all of it known by now
    for a, b in zip([*got, again], [*expected, expected[-1]], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * b.abs().max().item())
    assert len(graphs) == 0  # dropped with the handle


def latents(pipe, times=3, **options):
    return [FLUX.latents(pipe, steps=6, **options) for _ in range(times)][-1]


def test_a_model_that_waits_for_the_device_runs_as_it_is(tape):
    """The threshold reads how many tokens are alike; dense calls, and those that take a plan over, are recorded."""
    pipe = make_flux(1, 2)
    config = accel.TokenMergingConfig(
        matching=accel.Matching(threshold=0.2), dense_steps_first=2, dense_steps_last=0
    )
    with accel.accelerate(pipe, config):
        expected = latents(pipe)
    with accel.accelerate(pipe, config, compile="graphs") as handle:
        torch.testing.assert_close(latents(pipe), expected)
        (note,) = handle.stats.notes
        assert note.startswith("no CUDA graph: operation not permitted when stream is capturing at /")
        assert len(graphs_of(handle)) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.transformer.proj_out.register_forward_hook(lambda m, a, out: 2 * out),
        lambda pipe: pipe.transformer.proj_out.weight.set_(2 * pipe.transformer.proj_out.weight),
        lambda pipe: setattr(pipe.transformer, "proj_out", torch.nn.Linear(32, 16)),
    ],
    ids=["hook", "weights in another place", "another module"],
)
def test_what_was_recorded_of_a_model_that_has_changed_is_forgotten(tape, change):
    pipe = make_flux(1, 2)
    with accel.accelerate(pipe, CONFIGS["plain"], compile="graphs"):
        before = latents(pipe)
        torch.manual_seed(0)
        change(pipe)
        got = latents(pipe)
    assert not torch.allclose(got, before, rtol=1e-2)
    torch.testing.assert_close(got, latents(pipe, 1))


def test_weights_changed_in_place_are_seen(tape):
    pipe = make_flux(1, 2)
    with accel.accelerate(pipe, CONFIGS["plain"], compile="graphs") as handle:
        before = latents(pipe)
        pipe.transformer.proj_out.weight.mul_(2)
        got, records = latents(pipe, 1), tape.records
        assert len(graphs_of(handle)) == tape.records == records == 1
    assert not torch.allclose(got, before, rtol=1e-2)
    torch.testing.assert_close(got, latents(pipe, 1))


def test_offloading_that_is_switched_on_later_ends_recording(tape, monkeypatch):
    pipe = make_flux(1, 2)
    with accel.accelerate(pipe, CONFIGS["plain"], compile="graphs") as handle:
        expected = latents(pipe)
        assert (tape.records, handle.compiled) == (1, "graphs")
        moved = "offloading moves weights"
        offloaded = compiling._offloaded
        monkeypatch.setattr(
            compiling, "_no_graphs", lambda modules: moved if any(map(offloaded, modules)) else None
        )
        cpu = torch.device("cpu")
        pipe.transformer.enable_group_offload(cpu, offload_device=cpu, offload_type="leaf_level")
        replays = tape.replays
        torch.testing.assert_close(latents(pipe), expected)
        assert (tape.records, tape.replays, handle.compiled) == (1, replays, "")
        assert handle.stats.notes == [f"compile: {moved}"]


def test_fixed_rows_of_the_last_run_do_not_hide_a_processor_that_goes_another_way(tape):
    """One that makes its keys itself is found in the run in which it is put there."""
    pipe = make_flux(1, 2)
    with accel.accelerate(pipe, PRUNING, compile="graphs"):
        latents(pipe)
        attention = pipe.transformer.transformer_blocks[0].attn
        plain, part = attention.processor, attention.to_v

        class Own:
            def __call__(self, attn, *args, **kwargs):
                hooks, part._forward_hooks = part._forward_hooks, OrderedDict()
                try:
                    return plain(attn, *args, **kwargs)
                finally:
                    part._forward_hooks = hooks

        attention.processor = Own()
        with pytest.raises(UnsupportedError, match="keys and values of"):
            latents(pipe, 1)


@pytest.mark.parametrize(("host", "recorded"), [(0.9, True), (0.3, False)])
def test_only_calls_bound_by_launches_are_recorded_by_themselves(tape, host, recorded, monkeypatch):
    monkeypatch.setattr(compiling, "OPTIONS", {"backend": "eager"})
    tape.host = host
    pipe = make_flux(1, 2)
    with accel.accelerate(pipe, CONFIGS["plain"], compile=True) as handle:
        latents(pipe)
        assert len(graphs_of(handle)) == recorded
        assert handle.compiled == "blocks+graphs"


def test_no_more_graphs_than_the_limit(tape, monkeypatch):
    from accel.core import graphs

    monkeypatch.setattr(graphs, "LIMIT", 2)
    pipe = make_flux(1, 1)
    with accel.accelerate(pipe, CONFIGS["plain"], compile="graphs") as handle:
        for width in (32, 48, 64):
            latents(pipe, 1, width=width)
        assert len(graphs_of(handle)) == 2
        assert tape.records == 3


def test_gradients_are_not_recorded(tape):
    pipe = make_flux(1, 1)
    call = FLUX.call(steps=4)
    with accel.accelerate(pipe, CONFIGS["plain"], compile="graphs"), torch.enable_grad():
        type(pipe).__call__.__wrapped__(pipe, **call)
    assert tape.records == 0


def test_a_model_without_a_gpu_is_refused():
    with pytest.raises(UnsupportedError, match="CUDA graphs need the model on a CUDA device, it is on cpu"):
        accel.accelerate(make_flux(1, 1), compile="graphs")


def test_no_such_way():
    with pytest.raises(ConfigError, match="compile='graph': valid are True, False, blocks, whole, graphs"):
        accel.accelerate(make_flux(1, 1), compile="graph")
