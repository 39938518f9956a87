import gc
import weakref
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, make_flux, make_pixart
from diffusers import FlowMatchEulerDiscreteScheduler

import accel
from accel.core.plan import TokenPlan
from accel.core.schedule import Schedule
from accel.core.span import Span
from accel.errors import AlreadyAcceleratedError, ConfigError, UnknownNameError, UnsupportedError
from accel.methods.merging import Matching
from accel.pipelines.registry import find

Config = accel.TokenMergingConfig
OFF = {"dense_steps_first": 0, "dense_steps_last": 0, "dense_blocks_first": 0, "dense_blocks_last": 0}


def method_on(pipe):
    return next(iter(pipe.scheduler.step.accel_clock._listeners)).method


def built(handle):
    return [s.built for s in handle.stats.steps]


def test_plans_are_reused_between_refreshes(family):
    pipe = family.make()
    with accel.accelerate(pipe, Config(schedule=Schedule(refresh_every=3))) as handle:
        family.latents(pipe, steps=9, guidance=3.0)
        # Dense head and tail, then one build every third reduced step; the second call of guidance builds none.
        assert built(handle) == [0, 1, 0, 0, 1, 0, 0, 1, 0]
        assert [s.reused for s in handle.stats.steps] == [0, 0, 1, 1, 0, 1, 1, 0, 0]
        assert (handle.stats.plans_built, handle.stats.plans_reused) == (3, 4)


def test_refresh_at_and_layers():
    pipe = make_flux()  # 5 blocks
    with accel.accelerate(pipe, Config(schedule=Schedule(refresh_at=(3, 4)), refresh_layers=(3,))) as handle:
        FAMILIES["flux"].latents(pipe, steps=7)
        assert built(handle) == [0, 2, 0, 2, 2, 0, 0]
        assert [list(g.blocks) for g in method_on(pipe).groups] == [[1, 2], [3, 4]]


def test_drift_rebuilds_one_step_later():
    pipe, family = make_flux(), FAMILIES["flux"]
    with accel.accelerate(pipe, Config(schedule=Schedule(refresh_every=0), drift=1e-6)) as handle:
        family.latents(pipe, steps=8)
        assert sum(built(handle)) >= 2
    with accel.accelerate(pipe, Config(schedule=Schedule(refresh_every=0), drift=1e6)) as handle:
        family.latents(pipe, steps=8)
        assert sum(built(handle)) == 1


def test_stats_count_tokens_and_time(family):
    pipe = family.make()
    blocks = 5 if family is FAMILIES["flux"] else 3
    with accel.accelerate(pipe, Config(ratio=0.5)) as handle:
        family.latents(pipe, steps=4)
        stats = handle.stats
        assert [s.computed for s in stats.steps] == [96 * blocks, *[96 + 48 * (blocks - 1)] * 2, 96 * blocks]
        assert {s.total for s in stats.steps} == {96 * blocks}
        assert stats.share == sum(s.computed for s in stats.steps) / (4 * 96 * blocks)
        assert (stats.runs, stats.calls) == (1, 4)
        assert 0 < stats.seconds < 60
        assert f"{100 * stats.share:.1f} %" in str(stats)
        assert stats.as_dict()["steps"][1]["built"] == 1
        family.latents(pipe, steps=4)
        assert stats.runs == 2
        assert len(stats.steps) == 4
        stats.reset()
        assert stats.seconds is None
        assert stats.share == 1


def test_starting_in_the_middle_is_one_run():
    """Image-to-image: set_timesteps, then set_begin_index. The dense last step must be the last one left."""
    pipe = make_flux()
    call = FAMILIES["flux"].call(steps=6)
    with accel.accelerate(pipe, Config()) as handle:
        scheduler, latents = pipe.scheduler, torch.randn(1, 96, 16)
        scheduler.set_timesteps(6)
        scheduler.set_begin_index(2)
        for t in scheduler.timesteps[2:]:
            velocity = pipe.transformer(
                hidden_states=latents,
                timestep=t[None] / 1000,
                encoder_hidden_states=call["prompt_embeds"],
                pooled_projections=call["pooled_prompt_embeds"],
                txt_ids=torch.zeros(7, 3),
                img_ids=pipe._prepare_latent_image_ids(1, 8, 12, "cpu", torch.float32),
            ).sample
            latents = scheduler.step(velocity, t, latents).prev_sample
        assert handle.stats.runs == 1
        assert [s.computed < s.total for s in handle.stats.steps] == [False, True, True, False]


def test_blocks_really_get_half_of_the_tokens(family):
    pipe = family.make()
    seen = []
    for _, block in pipe.transformer.transformer_blocks.named_children():
        norm = block.norm1.norm if hasattr(block.norm1, "norm") else block.norm1
        norm.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
    with accel.accelerate(pipe, Config(ratio=0.5, **OFF)):
        family.latents(pipe, steps=2)
    assert set(seen) == {48}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_protected_tokens_stay_alone(family, guidance):
    """The most important tokens own their slot: by guidance where there is guidance, else by local detail."""
    pipe = family.make()
    with accel.accelerate(
        pipe, Config(matching=Matching(protect=0.2), schedule=Schedule(refresh_every=1, dense_last=0))
    ):
        method, plans = method_on(pipe), []
        build, score = method.build, method._importance
        scores = []
        method._importance = lambda *a: scores.append(score(*a)) or scores[-1]
        method.build = lambda *a: plans.append((build(*a), method.state.guidance)) or plans[-1][0]
        family.latents(pipe, steps=4, guidance=guidance)
    assert len(plans) == 3
    for (plan, guided), s in zip(plans, scores, strict=True):
        assert (guided is not None) == (guidance > 1)
        owner, size = plan.owner[0], plan.size[0]
        protected = s[0].topk(19).indices
        assert torch.equal(plan.dst[0, owner[protected]], protected)  # never merged into another
        assert size.sum() == 96


def test_both_halves_of_batched_guidance_share_a_plan():
    pipe = make_pixart()
    with accel.accelerate(pipe, Config()):
        method, plans = method_on(pipe), []
        build = method.build
        method.build = lambda *a: plans.append(build(*a)) or plans[-1]
        FAMILIES["pixart"].latents(pipe, batch=2, guidance=3.0)
    (plan,) = plans
    assert plan.owner.shape == (4, 96)
    assert torch.equal(plan.owner[:2], plan.owner[2:])
    assert not torch.equal(plan.owner[0], plan.owner[1])  # but every image has its own


def test_threshold_bounds_what_is_merged(family):
    pipe = family.make()
    shares = []
    for threshold in (-1.0, 0.3, 1.0):
        with accel.accelerate(pipe, Config(matching=Matching(threshold=threshold, protect=0.0))) as handle:
            family.latents(pipe)
            shares.append(handle.stats.share)
            plain = [s.computed == s.total for s in handle.stats.steps]
    with accel.accelerate(pipe, Config(matching=Matching(protect=0.0))) as handle:
        family.latents(pipe)
        assert shares[0] == handle.stats.share  # everything is similar enough: `ratio` is the bound
    assert shares[0] <= shares[1] < shares[2] == 1  # nothing is: all tokens are computed
    assert all(plain)


@pytest.mark.parametrize(
    "options", [{"matching": {"destinations": "important"}}, {"matching": {"destinations": "unimportant"}}]
)
@pytest.mark.parametrize("scope", ["span", "block"])
def test_other_choices_run_and_differ(family, options, scope):
    pipe = family.make()
    base = Config(scope=scope)
    with accel.accelerate(pipe, base):
        a = family.latents(pipe)
    with accel.accelerate(pipe, replace(base, **options)):
        assert not torch.equal(a, family.latents(pipe))
    with accel.accelerate(pipe, replace(base, matching=Matching(merge="pick"))):
        assert not torch.equal(a, family.latents(pipe))
    with accel.accelerate(pipe, replace(base, matching=Matching(seed=1))):
        assert not torch.equal(a, family.latents(pipe))


def test_proportional_attention_is_exact_for_equal_tokens():
    """Merging identical tokens loses nothing if a merged key weighs as many as it stands for, and only then.

    PixArt's block on an image of equal 2x2 cells: keys merge four to one. Without the bias the softmax would
    still be right here if all sizes were equal, so one cell is left unmerged.
    """
    pipe = make_pixart()
    block = pipe.transformer.transformer_blocks[0]
    g = torch.Generator().manual_seed(0)
    cells = torch.randn(1, 8, 32, generator=g)
    sizes = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8])
    owner = torch.repeat_interleave(torch.arange(8), sizes)[None]
    first = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)[:-1]])[None]
    plan = TokenPlan.build(first, owner)
    x = plan.expand(cells)
    inputs = {
        "encoder_hidden_states": torch.randn(1, 7, 32, generator=g),
        "timestep": torch.randn(1, 6 * 32, generator=g),
    }
    exact = block(x, **inputs)
    site = find(pipe.transformer).tokens.sites(pipe.transformer)[0]
    errors = {}
    for bias in (True, False):
        with ExitStack() as stack:
            Span(lambda x: plan).attach(pipe.transformer, [site], stack, bias=bias)
            errors[bias] = (block(x, **inputs) - exact).abs().max().item()
    assert errors[True] < 1e-5
    assert errors[False] > 1e-2


def test_proportional_attention_in_flux_weighs_image_keys_only():
    pipe, family = make_flux(), FAMILIES["flux"]
    masks = []
    attention = pipe.transformer.single_transformer_blocks[0].attn
    attention.register_forward_pre_hook(
        lambda m, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    with accel.accelerate(pipe, Config(proportional=True, dense_steps_first=0)):
        plan_of = method_on(pipe).groups[0]
        seen = []
        observe = plan_of.spans[0][0]
        observe.observe = lambda x, reduced, plan: seen.append(plan)
        family.latents(pipe, steps=3)
    assert torch.equal(masks[0][0, 0, 0, :7], torch.zeros(7))
    torch.testing.assert_close(masks[0][0, 0, 0, 7:].exp(), seen[0].size[0])


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 1.0}, r"ratio must be in \[0, 1\)"),
        ({"ratio": -0.1}, r"\[0, 1\)"),
        ({"ratio": "half"}, r"\[0, 1\)"),
        ({"matching": {"threshold": 1.5}}, r"threshold must be in \[-1, 1\]"),
        ({"scope": "spam"}, "span, block"),
        ({"matching": {"cell": 1}}, "cell must be a whole number >= 2"),
        ({"matching": {"cell": 2}, "ratio": 0.8}, "largest ratio here is 0.65"),
        ({"matching": {"protect": 0.6}}, "Lower one of them"),
        ({"schedule": {"refresh_every": -1}}, ">= 0"),
        ({"refresh_layers": "some"}, "all"),
        ({"refresh_layers": (0.5,)}, "whole numbers"),
        ({"drift": 0}, "drift must be > 0"),
        ({"proportional": 1}, "true, false or None"),
        ({"matching": {"seed": 0.5}}, "whole number"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Config(**settings)
    assert isinstance(caught.value, ValueError)


def test_unknown_names_are_told_the_nearest():
    pipe = make_flux()
    with pytest.raises(UnknownNameError, match=r"'balancd'.*Did you mean 'balanced'.*tomesd"):
        accel.accelerate(pipe, "balancd")
    with pytest.raises(UnknownNameError, match=r"'ratoi'.*Did you mean 'ratio'.*matching"):
        accel.accelerate(pipe, {"method": "token_merging", "ratoi": 0.5})
    with pytest.raises(UnknownNameError, match="'token_merging'"):
        accel.accelerate(pipe, {"method": "token_mergin"})
    pipe.transformer.__class__ = type("FluxTransformerModel", (torch.nn.Module,), {})
    with pytest.raises(
        UnsupportedError, match=r"not known of FluxTransformerModel .*tokens.*Forecasts.*register"
    ):
        accel.accelerate(pipe, "merging")


@pytest.mark.parametrize("wrong", [object(), make_flux().transformer], ids=["object", "denoiser"])
def test_not_a_pipeline(wrong):
    with pytest.raises(UnsupportedError, match="Pass the pipeline itself"):
        accel.accelerate(wrong)


def test_not_a_config():
    with pytest.raises(ConfigError, match="TokenMergingConfig"):
        accel.accelerate(make_flux(), 0.5)


def test_twice_is_refused_or_replaced():
    pipe = make_flux()
    first = accel.accelerate(pipe, Config(ratio=0.5))
    with pytest.raises(AlreadyAcceleratedError, match="replace=True"):
        accel.accelerate(pipe, Config(ratio=0.3))
    second = accel.accelerate(pipe, Config(ratio=0.3), replace=True)
    assert not first.attached
    assert second.attached
    first.remove()  # must not touch its successor
    FAMILIES["flux"].latents(pipe, steps=3)
    assert second.stats.share < 1
    second.remove()


def test_a_handle_nobody_kept_is_still_found_and_dies_with_the_pipeline():
    pipe = make_flux()
    accel.accelerate(pipe)
    gc.collect()
    with pytest.raises(AlreadyAcceleratedError):
        accel.accelerate(pipe)
    gone = weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert gone() is None


def test_failing_to_attach_leaves_nothing():
    pipe = make_flux()
    with pytest.raises(UnsupportedError, match="nothing to merge"):
        accel.accelerate(pipe, Config(dense_blocks_first=3, dense_blocks_last=2))
    assert "step" not in vars(pipe.scheduler)
    accel.accelerate(pipe, Config()).remove()


def test_a_size_at_which_nothing_can_be_merged(family):
    pipe = family.make()
    with accel.accelerate(pipe, Config(ratio=0.01)), pytest.raises(UnsupportedError, match="merges nothing"):
        family.latents(pipe, height=8, width=8)


def test_a_schedule_without_a_reduced_step_warns():
    pipe = make_flux()
    with (
        accel.accelerate(pipe, Config(dense_steps_first=3)),
        pytest.warns(accel.AccelWarning, match="all 3 steps are dense"),
    ):
        FAMILIES["flux"].latents(pipe, steps=3)


def test_controlnet_is_refused_in_span_scope_and_works_around_blocks():
    pipe = make_flux()
    residual = torch.zeros(1, 96, 32)

    def add_residual(module, args, kwargs):
        return args, {**kwargs, "controlnet_block_samples": [residual, residual]}

    pipe.transformer.register_forward_pre_hook(add_residual, with_kwargs=True)
    with accel.accelerate(pipe, Config()), pytest.raises(UnsupportedError, match="controlnet_block_samples"):
        FAMILIES["flux"].latents(pipe)
    with accel.accelerate(pipe, Config(scope="block")):
        FAMILIES["flux"].latents(pipe)


def test_reference_image_tokens_are_refused():
    pipe = make_flux()

    def shift(module, args, kwargs):
        return args, {**kwargs, "img_ids": kwargs["img_ids"].flip(0)}

    pipe.transformer.register_forward_pre_hook(shift, with_kwargs=True)
    with accel.accelerate(pipe, Config()), pytest.raises(UnsupportedError, match="row-major grid"):
        FAMILIES["flux"].latents(pipe)


def test_replacing_the_scheduler_is_noticed():
    pipe = make_flux()
    with accel.accelerate(pipe, Config()):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler()
        with pytest.raises(UnsupportedError, match="scheduler was replaced"):
            FAMILIES["flux"].latents(pipe)


def test_calling_the_denoiser_alone_warns():
    pipe = make_pixart()
    with (
        accel.accelerate(pipe, Config()),
        pytest.warns(accel.AccelWarning, match="outside of a denoising loop"),
    ):
        pipe.transformer(
            torch.zeros(1, 4, 16, 16),
            encoder_hidden_states=torch.zeros(1, 7, 16),
            timestep=torch.tensor([1]),
        )


def test_two_pipelines_at_once():
    a, b, family = make_flux(), make_flux(), FAMILIES["flux"]
    with accel.accelerate(a, Config(ratio=0.5)):
        expected = family.latents(a)
        with accel.accelerate(b, Config(ratio=0.25)) as handle:
            assert not torch.equal(family.latents(b), expected)
            assert torch.equal(family.latents(a), expected)
            assert handle.stats.runs == 1


# Presets


def test_every_preset_loads_and_has_only_known_keys():
    assert {"quality", "balanced", "fast", "draft", "few-step", "merging", "tomesd"} <= set(
        accel.configs.names()
    )
    for name in accel.configs.names():
        accel.configs.load(name)
    assert accel.configs.load("tomesd") == Config.tomesd(0.5)
    for name in ("quality", "balanced", "fast", "draft"):
        assert accel.configs.load(name).correct == "auto"
    # Nothing is left out of a run of four steps; less is computed within three of them.
    budgets = [phase.budget for phase in accel.configs.load("few-step").full_schedule.phases(4)]
    assert budgets == [1, 0.7, 0.4, 0.4]


def test_a_yaml_file(tmp_path):
    path = tmp_path / "mine.yaml"
    config = Config(ratio=0.4, schedule=Schedule(refresh_at=(1, 5)))
    path.write_text("method: token_merging\nratio: 0.4\nschedule:\n  refresh_at: [1, 5]\n")
    assert accel.configs.load(path) == config
    assert accel.configs.load(str(path)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ratio: 0.5", "`method` is missing"),
        ("- a", "expected `method"),
        ("method: [", "not valid YAML"),
        ("method: token_merging\nratio: 2", r"ratio must be in \[0, 1\)"),
        ("method: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_bad_yaml_names_the_file(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        accel.configs.load(path)
    assert "bad.yaml" in str(caught.value)


def test_missing_yaml(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        accel.configs.load(tmp_path / "none.yaml")


def test_public_names_exist():
    assert set(accel.__all__) <= set(dir(accel))
    for name in accel.__all__:
        assert getattr(accel, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = accel.nothing_like_it
