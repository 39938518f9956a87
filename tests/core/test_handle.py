"""What `accelerate` returns, and what attaching does to things that are not the denoiser's calls."""

from __future__ import annotations

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES, make_flux, make_pixart
from diffusers import DDPMScheduler, FirstBlockCacheConfig, UNet2DConditionModel

import accel
from accel.core.keyvalues import Attention
from accel.errors import ConfigError, UnsupportedError
from accel.pipelines import registry

FLUX = FAMILIES["flux"]


def test_replacing_with_what_is_refused_keeps_the_old_one():
    pipe = make_flux()
    handle = accel.accelerate(pipe, accel.TokenPruningConfig(cycle=(0.5, 1), keys_values="none"))
    expected = FLUX.latents(pipe)
    pipe.transformer.fuse_qkv_projections()
    fused = FLUX.latents(pipe)
    with pytest.raises(UnsupportedError, match="fused projections"):
        accel.accelerate(pipe, accel.TokenPruningConfig(cycle=(0.5, 1)), replace=True)
    assert handle.attached
    assert torch.equal(FLUX.latents(pipe), fused)
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(FLUX.latents(pipe), expected)
    accel.accelerate(pipe, accel.TokenPruningConfig(cycle=(0.5, 1)), replace=True)
    assert not handle.attached


def test_a_handle_does_not_keep_the_model_alive():
    pipe = make_flux()
    handle = accel.accelerate(pipe, "balanced")
    FLUX.latents(pipe, steps=10)
    model = weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert model() is None
    assert not handle.attached
    handle.remove()  # nothing to do, nothing to complain about
    assert handle.stats.runs == 1


def test_compiled_code_of_others_is_not_thrown_away(monkeypatch):
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    pipe = make_flux()
    with accel.accelerate(pipe, "balanced"):
        pass
    assert not resets
    pipe.transformer.transformer_blocks[0].compile(backend="eager")  # regional
    with accel.accelerate(pipe, "merging"):
        assert len(resets) == 1
    assert len(resets) == 2
    pipe = make_flux()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with accel.accelerate(pipe, "merging"):
        assert len(resets) == 3


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_tomesd_merges_at_the_first_step_also_when_compiled(family):
    family = FAMILIES[family]
    found = []
    for compiled in (False, True):
        torch.compiler.reset()
        pipe = family.make(**family.shallow)
        if compiled:
            pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
        with accel.accelerate(pipe, "tomesd") as handle:
            found.append((family.latents(pipe, steps=3), [s.computed for s in handle.stats.steps]))
    (eager, eager_steps), (traced, traced_steps) = found
    assert eager_steps == traced_steps
    assert len(set(traced_steps)) == 1
    torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-5)


def test_first_block_cache_goes_with_forecasts_and_not_with_fewer_tokens():
    pipe = make_flux()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    plain = FLUX.latents(pipe, steps=10)
    with accel.accelerate(pipe, "balanced") as handle:
        assert torch.isfinite(FLUX.latents(pipe, steps=10)).all()
        assert handle.stats.share < 1
    with accel.accelerate(pipe, "merging"), pytest.raises(UnsupportedError, match="disable_cache"):
        FLUX.latents(pipe, steps=10)
    assert torch.equal(FLUX.latents(pipe, steps=10), plain)


def test_a_denoiser_called_decoder_draws_no_tokens():
    class Cascade:
        decoder = UNet2DConditionModel(
            block_out_channels=(8, 8),
            norm_num_groups=4,
            layers_per_block=1,
            cross_attention_dim=8,
            attention_head_dim=4,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            mid_block_type=None,
        )
        scheduler = DDPMScheduler()

    pipe = Cascade()
    plain = set(vars(pipe.decoder))
    with accel.accelerate(pipe, "balanced"):
        assert set(vars(pipe.decoder)) > plain
    assert set(vars(pipe.decoder)) == plain
    with pytest.raises(UnsupportedError, match=r"token_merging needs what is not known .*tokens"):
        accel.accelerate(pipe, "merging")


def test_what_is_no_pipeline_is_told_so():
    with pytest.raises(UnsupportedError, match="expected a diffusers pipeline"):
        accel.accelerate(SimpleNamespace(scheduler=DDPMScheduler()), "balanced")


def test_an_adapter_of_another_model_is_refused_when_it_is_attached(monkeypatch):
    monkeypatch.setitem(
        registry._REGISTERED, "PixArtTransformer2DModel", registry.find(make_flux().transformer)
    )
    with pytest.raises(
        ConfigError, match=r"'FLUX' declares the argument 'image_rotary_emb' of 'transformer_blocks\.0'"
    ):
        accel.accelerate(make_pixart(), "merging")


def test_an_attention_that_is_not_there_is_named(monkeypatch):
    from dataclasses import replace

    pipe = make_pixart()
    wrong = replace(
        registry.find(pipe.transformer),
        attentions=lambda d: [Attention("transformer_blocks.0.attn7", "to_k", "to_v")],
    )
    monkeypatch.setitem(registry._REGISTERED, "PixArtTransformer2DModel", wrong)
    with pytest.raises(ConfigError, match="attn7"):
        accel.accelerate(pipe, accel.TokenPruningConfig())


def test_replacing_after_another_scheduler_was_set():
    """As the message about it advises."""
    pipe = make_flux()
    first = accel.accelerate(pipe, "balanced")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    with pytest.raises(UnsupportedError, match=r"replace=True"):
        FLUX.latents(pipe, steps=10)
    with accel.accelerate(pipe, "balanced", replace=True) as handle:
        FLUX.latents(pipe, steps=10)
        assert handle.stats.share < 1
    assert not first.attached


def test_a_bar_of_the_users_own_is_left_alone():
    from contextlib import nullcontext

    pipe = make_flux()
    own = SimpleNamespace(update=lambda *_: None)
    pipe.progress_bar = lambda *args, **kwargs: nullcontext(own)
    plain = FLUX.latents(pipe, steps=10)
    with accel.accelerate(pipe, "balanced"):
        assert not torch.equal(FLUX.latents(pipe, steps=10), plain)
    assert torch.equal(FLUX.latents(pipe, steps=10), plain)


def test_forecasts_that_never_coincide_go_together():
    pipe = make_flux()
    merging = accel.TokenMergingConfig(cycle=(1, 0, 1, 1), dense_steps_first=2, dense_steps_last=0, order=1)
    forecast = accel.ForecastConfig(cycle=(1, 1, 0, 1), dense_steps_first=2, dense_steps_last=0)
    with accel.accelerate(pipe, merging), accel.accelerate(pipe, forecast) as handle:
        FLUX.latents(pipe, steps=10)
        assert [int(s.computed > 0) for s in handle.stats.steps] == [1, 1, 1, 0, 0, 1, 1, 0, 0, 1]


@pytest.mark.parametrize("config", ["balanced", "merging", accel.TokenPruningConfig(cycle=(0.5, 1))])
def test_what_cuda_graphs_would_overwrite_is_cloned(config, monkeypatch):
    """Poisoned after every call, as the next replay would: the pictures stay the same."""
    from accel.core import gate as gates

    def run(poison):
        pipe = make_flux()
        monkeypatch.setattr(gates.Gate, "overwrites", property(lambda self: poison))
        made = []
        with accel.accelerate(pipe, config):
            pipe.transformer.register_forward_hook(lambda m, a, out: made.append(out[0]))
            if poison:
                step = pipe.scheduler.step

                def overwriting(*args, **kwargs):
                    out = step(*args, **kwargs)
                    for tensor in made:
                        tensor.fill_(float("nan"))
                    made.clear()
                    return out

                monkeypatch.setattr(pipe.scheduler, "step", overwriting)
            return FLUX.latents(pipe, steps=10, guidance=3.0)

    assert torch.equal(run(True), run(False))


def test_a_loop_of_several_steps_at_each_time_is_refused_by_name():
    """A panorama's pipeline copies its scheduler's dictionary for every view, the clock's wrappers along with it."""
    pipe = make_flux()
    plain = dict(pipe.scheduler.__dict__)
    with accel.accelerate(pipe, "balanced"):
        assert copy.deepcopy(pipe.scheduler).__dict__.keys() == plain.keys()
        with pytest.raises(UnsupportedError, match="a step for each view"):
            copy.deepcopy(pipe.scheduler.__dict__)
    copy.deepcopy(pipe.scheduler.__dict__)


def test_a_pipeline_that_reads_attention_maps_is_refused_by_name():
    class StableDiffusionSAGPipeline(SimpleNamespace):
        pass

    pipe = StableDiffusionSAGPipeline(unet=torch.nn.Identity(), scheduler=DDPMScheduler())
    with pytest.raises(UnsupportedError, match="StableDiffusionSAGPipeline reads attention maps"):
        accel.accelerate(pipe, "balanced")
