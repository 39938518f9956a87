"""Token pruning on both families: exact where it must be exact, and the negative controls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, freeze, log_snr, make_flux, make_pixart
from diffusers import FlowMatchHeunDiscreteScheduler

import accel
from accel.core.schedule import Schedule
from accel.core.site import Side
from accel.errors import ConfigError, UnsupportedError
from accel.methods.pruning import Selection
from accel.methods.pruning.engine import _spread
from accel.pipelines import registry

Config = accel.TokenPruningConfig
GUIDED = {"guidance": 3.0, "batch": 2}
OPTIONS = pytest.mark.parametrize("options", [{}, GUIDED], ids=["plain", "guided"])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def method_on(pipe):
    return next(iter(pipe.scheduler.step.accel_clock._listeners)).method


def selections(pipe):
    """The selected positions (G, K) of every partial step, recorded while the pipeline runs."""
    method, seen = method_on(pipe), []
    select = method._select
    method._select = lambda run: select(run) or seen.append(method.state.plan.dst)
    return seen


@OPTIONS
def test_budget_one_is_bit_exact_and_says_so(family, options):
    pipe = family.make()
    plain = family.latents(pipe, **options)
    with pytest.warns(accel.AccelWarning, match="every budget is 1"):
        handle = accel.accelerate(pipe, Config(cycle=(1,)))
    with handle:
        assert torch.equal(family.latents(pipe, **options), plain)
    # Dense steps that store keys and values for a partial step after them compute the very same.
    changed = family.latents(pipe, steps=3, **options)
    with accel.accelerate(pipe, Config(cycle=(0.5,), dense_steps_last=0)):
        outputs = []
        pipe.transformer.register_forward_hook(lambda m, args, output: outputs.append(output[0]))
        family.latents(pipe, steps=3, **options)
    exact = outputs[: 2 * len(outputs) // 3]
    outputs.clear()
    assert torch.equal(family.latents(pipe, steps=3, **options), changed)
    assert all(torch.equal(a, b) for a, b in zip(exact, outputs, strict=False))


@OPTIONS
@pytest.mark.parametrize("keys_values", ["all", 0.4, "none"])
def test_selecting_all_tokens_is_the_plain_pipeline(family, options, keys_values):
    pipe = family.make()
    plain = family.latents(pipe, **options)
    with accel.accelerate(pipe, Config(cycle=(0.999,), keys_values=keys_values)) as handle:
        assert relative(family.latents(pipe, **options), plain) < 1e-5
        assert handle.stats.plans_built == 3
        assert handle.stats.share == 1


FROZEN = [
    Config(cycle=(0.3,)),
    Config(cycle=(0.1, 0), order=2, selection=Selection(clusters=6, max_age=3)),
    Config(order=0, selection=Selection(clusters=4, clustering="kmeans", score="age", fresh_share=0.5)),
]


@OPTIONS
@pytest.mark.parametrize("config", FROZEN, ids=["third", "mixed", "hold"])
def test_a_frozen_denoiser_is_reproduced(family, options, config):
    """Same input at every step: kept keys and values are the right ones, and so is every forecast."""
    pipe = family.make()
    freeze(pipe)
    plain = family.latents(pipe, steps=8, **options)
    with accel.accelerate(pipe, config) as handle:
        assert relative(family.latents(pipe, steps=8, **options), plain) < 1e-5
        assert handle.stats.share < 0.8


def test_without_keys_and_values_a_frozen_denoiser_is_not(family):
    # The negative control: computed tokens see only each other.
    pipe = family.make()
    freeze(pipe)
    plain = family.latents(pipe, steps=8)
    with accel.accelerate(pipe, Config(cycle=(0.3,), keys_values="none")) as handle:
        assert relative(family.latents(pipe, steps=8), plain) > 1e-3
        assert handle.stats.cache_bytes > 0


def test_a_rotary_table_that_does_not_follow_is_noticed(monkeypatch):
    # The negative control: the table's rows stay in the order of the grid.
    pipe = make_flux()
    adapter = registry.find(pipe.transformer)
    keep = Side(
        "image_rotary_emb", lambda get, plan: tuple(t[: 7 + plan.slots] for t in get("image_rotary_emb"))
    )
    tokens = adapter.tokens
    sites = lambda d: [replace(s, sides=(keep,)) for s in tokens.sites(d)]  # noqa: E731
    wrong = replace(adapter, tokens=replace(tokens, sites=sites))
    monkeypatch.setitem(registry._REGISTERED, "FluxTransformer2DModel", wrong)
    freeze(pipe)
    plain = FAMILIES["flux"].latents(pipe, steps=8)
    with accel.accelerate(pipe, Config(cycle=(0.3,))):
        assert relative(FAMILIES["flux"].latents(pipe, steps=8), plain) > 1e-3


def test_computed_tokens_attend_to_the_whole_image(family):
    pipe = family.make()
    seen = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, **kwargs):
        q, k = args[:2] if args else (kwargs["query"], kwargs["key"])
        if k.shape[-2] >= 48:  # not the attention to the text
            seen.append((q.shape[-2], k.shape[-2]))
        return sdpa(*args, **kwargs)

    text = 7 if family is FAMILIES["flux"] else 0
    for keys_values, keys in (("all", {96}), (0.4, {96, 48}), ("none", {48})):
        seen.clear()
        with (
            accel.accelerate(pipe, Config(cycle=(0.5,), keys_values=keys_values)),
            pytest.MonkeyPatch.context() as m,
        ):
            m.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
            family.latents(pipe, steps=4)
        assert set(seen) == {(96 + text, 96 + text), *((48 + text, k + text) for k in keys)}


def test_keys_and_values_of_some_layers_take_their_share_of_the_memory(family):
    pipe, blocks = family.make(), 5 if family is FAMILIES["flux"] else 3
    taken = {}
    for keys_values in ("none", 0.4, "all"):
        with accel.accelerate(pipe, Config(cycle=(0.5,), keys_values=keys_values)) as handle:
            family.latents(pipe, steps=6)
        taken[keys_values] = handle.stats.cache_bytes
    share = (taken[0.4] - taken["none"]) / (taken["all"] - taken["none"])
    assert share == pytest.approx(round(0.4 * blocks) / blocks, abs=0.03)  # with text in some of FLUX's


def test_layers_that_keep_are_spread_evenly():
    assert _spread(list(range(10)), 0.3) == [1, 5, 8]
    assert _spread(list(range(10)), 0.01) == [5]


def test_stats(family):
    pipe, blocks = family.make(), 5 if family is FAMILIES["flux"] else 3
    with accel.accelerate(pipe, Config(budget=0.25)) as handle:
        family.latents(pipe, steps=9)
        steps, stats = handle.stats.steps, handle.stats
    assert [s.computed // blocks for s in steps] == [96, 96, 0, 24, 0, 96, 0, 24, 96]
    assert all(s.forecast + s.computed == s.total == 96 * blocks for s in steps)
    assert [int(s.oldest_age) for s in steps] == [0, 0, 1, 2, 3, 0, 1, 2, 0]
    assert stats.plans_built == 2
    assert stats.oldest_age == 3
    assert stats.as_dict()["steps"][4]["oldest_age"] == 3
    # Keys and values of every block for all tokens (text too, in FLUX's single-stream blocks), the history, and
    # per token the error, how often it was selected (4 bytes each) and when it was computed last (8).
    rows = 2 * 96 + 3 * (96 + 7) if family is FAMILIES["flux"] else 3 * 96
    output = 96 * 16 if family is FAMILIES["flux"] else 8 * 16 * 24
    assert stats.cache_bytes == 4 * (2 * rows * 32 + 2 * output + 2 * 96 + (1 + 1 + 2) * 96)
    # CAT's score keeps the predictions before the last dense step too, and labels of its clusters, but no error.
    pipe, held = family.make(), stats.cache_bytes
    with accel.accelerate(pipe, Config(selection=Selection(score="change", clusters=4))) as handle:
        family.latents(pipe, steps=9)
    assert handle.stats.cache_bytes == held + 4 * (output - 96 + 2 * 96)


def test_a_late_cycle_may_be_the_only_one_with_partial_steps(family):
    pipe, tokens = family.make(), 96 * (5 if family is FAMILIES["flux"] else 3)
    with accel.accelerate(
        pipe, Config(schedule=Schedule(cycle=(0, 1), late_cycle=(0, 0.5), dense_first=2))
    ) as handle:
        family.latents(pipe, steps=8)
    assert [s.computed / tokens for s in handle.stats.steps] == [1, 1, 0, 1, 0, 0.5, 0, 1]


@pytest.mark.parametrize(
    ("settings", "cycle"),
    [
        ({}, (0, 0.25, 0, 1)),
        ({"budget": 0.5, "schedule": {"refresh_every": 3}}, (0, 0.5, 1)),
        ({"budget": 0.5, "schedule": {"refresh_every": 6}}, (0, 0.5, 0, 0.5, 0, 1)),
        ({"schedule": {"cycle": (0.5,), "refresh_every": 4}}, (0.5, 0.5, 0.5, 1)),
        ({"cycle": (0.5, 0.25)}, (0.5, 0.25)),
    ],
)
def test_a_dense_step_at_every_nth(settings, cycle):
    assert Config(**settings).full_schedule.cycle == cycle


def test_a_late_cycle_is_refreshed_only_if_asked_for():
    late, often = (Schedule(late_cycle=(0, 0, 1), refresh_every=every) for every in (None, 5))
    assert Config(budget=0.5, schedule=late).full_schedule.late_cycle == (0, 0, 1)
    assert Config(budget=0.5, schedule=often).full_schedule.late_cycle == (0, 0, 1, 0, 1)


@pytest.mark.parametrize("score", ["error", "change", "age"])
def test_the_worst_tokens_are_computed(score):
    """With guidance in two calls; scores computed again from the pipeline's own predictions."""
    pipe, family = make_flux(), FAMILIES["flux"]
    outputs = []
    with accel.accelerate(
        pipe, Config(cycle=(0.25, 0.25), selection=Selection(score=score), dense_steps_first=3)
    ):
        pipe.transformer.register_forward_hook(lambda m, args, output: outputs.append(output[0][0]))
        chosen = selections(pipe)
        times = None

        def keep(pipe, step, timestep, kwargs):
            nonlocal times
            times = log_snr(pipe.scheduler)
            return kwargs

        family.latents(pipe, steps=6, guidance=3.0, callback_on_step_end=keep)
    a, b, c = (torch.stack(outputs[2 * i : 2 * i + 2]) for i in range(3))
    t = times
    if score == "error":
        forecast = b + (b - a) * (t[2] - t[1]) / (t[1] - t[0])
        error = (c - forecast).norm(dim=-1).mean(0) / (t[2] - t[1]) ** 2
        want = torch.nn.functional.avg_pool2d(
            torch.nn.functional.pad(error.view(1, 1, 8, 12), (1, 1, 1, 1)), 3, 1
        ) / torch.nn.functional.avg_pool2d(
            torch.nn.functional.pad(torch.ones(1, 1, 8, 12), (1, 1, 1, 1)), 3, 1
        )
        want = want.flatten()
    elif score == "change":
        want = (c - b).norm(dim=-1).mean(0)
    else:  # all are equally old after a dense step, then those not chosen are
        assert not set(chosen[0][0].tolist()) & set(chosen[1][0].tolist())
        return
    assert set(chosen[0][0].tolist()) == set(want.topk(24).indices.tolist())


def test_both_halves_of_guidance_share_a_plan_and_images_do_not():
    pipe = make_pixart()
    with accel.accelerate(pipe, Config()):
        chosen = selections(pipe)
        FAMILIES["pixart"].latents(pipe, steps=6, **GUIDED)
    assert chosen[0].shape == (4, 24)
    assert torch.equal(chosen[0][:2], chosen[0][2:])
    assert not torch.equal(chosen[0][0], chosen[0][1])


@pytest.mark.parametrize("max_age", [1, 2, 4])
@pytest.mark.parametrize("extra", [{}, {"clusters": 5}, {"fresh_share": 1.0}], ids=str)
def test_age_never_exceeds_the_bound(family, max_age, extra):
    pipe = family.make()
    with accel.accelerate(
        pipe, Config(cycle=(0.3, 0), selection=Selection(max_age=max_age, **extra))
    ) as handle:
        family.latents(pipe, steps=12)
        assert 0 < handle.stats.oldest_age <= max_age
        assert handle.stats.share < 1


def test_cat_computes_about_half_at_28_steps():
    pipe = make_flux()
    with accel.accelerate(pipe, Config.cat()) as handle:
        FAMILIES["flux"].latents(pipe, steps=28)
        assert 0.4 < handle.stats.share < 0.55
        chosen = selections(pipe)
        FAMILIES["flux"].latents(pipe, steps=28)
    often = torch.stack([torch.zeros(96).scatter(0, dst[0], 1.0) for dst in chosen]).sum(0)
    assert often.min() >= 2  # staleness reaches every token


def test_compiled_equals_eager(family):
    pipe = family.make(**family.shallow)
    config = Config(cycle=(0.3, 0, 1), dense_steps_first=2)
    eager, options = pipe.transformer, {"guidance": 3.0, "steps": 8}
    with accel.accelerate(pipe, config):
        expected = family.latents(pipe, **options)
    pipe.transformer = torch.compile(eager, fullgraph=True, backend="eager")
    with accel.accelerate(pipe, config):
        assert relative(family.latents(pipe, **options), expected) < 1e-5
        torch._dynamo.utils.counters.clear()
        family.latents(pipe, **{**options, "steps": 14})
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0  # no graph per step


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, r"budget must be in \(0, 1\]"),
        ({"budget": 1.5}, r"budget must be in \(0, 1\]"),
        ({"cycle": (0.5, 1.2)}, r"cycle must be a list of budgets in \[0, 1\]"),
        ({"cycle": ()}, r"schedule.cycle must be a list"),
        ({"schedule": {"late_cycle": (0.5, -1)}}, r"late_cycle must be a list of budgets in \[0, 1\]"),
        ({"schedule": {"late_from": 0}}, r"late_from must be in \(0, 1\)"),
        ({"order": 3}, "order must be 0, 1 or 2"),
        ({"selection": {"score": "errors"}}, "error, change, age"),
        ({"selection": {"clusters": -1}}, "clusters must be a whole number >= 0"),
        ({"selection": {"clustering": "means"}}, "grid, kmeans"),
        ({"selection": {"fresh_share": 1.1}}, r"fresh_share must be in \[0, 1\]"),
        ({"selection": {"max_age": 0}}, "max_age must be a whole number >= 1"),
        ({"keys_values": "some"}, "all, none"),
        ({"keys_values": 1}, "a share in"),
        ({"dense_steps_first": 0}, "schedule.dense_first must be a whole number >= 1"),
        ({"dense_steps_last": -1}, "schedule.dense_last must be a whole number >= 0"),
        ({"selection": {"score": "change"}, "dense_steps_first": 1}, "schedule.dense_first must be >= 2"),
        ({"schedule": {"refresh_every": 0}}, "refresh_every must be a whole number >= 2 or None, got 0"),
        ({"schedule": {"refresh_every": True}}, "refresh_every must be a whole number >= 0"),
        ({"budget": 0.3, "cycle": (0.5,)}, r"budget=0.3 has no effect: .* 0.5\. Leave budget out"),
        ({"budget": 0.25, "cycle": (0, 0.5, 1)}, "budget=0.25 has no effect: .* 0, 0.5, 1"),
        ({"budget": 0.3, "schedule": {"refresh_every": 2}}, "budget=0.3 has no effect: .* 0, 1"),
        ({"schedule": {"late_from": 0.3}}, "late_from=0.3 has no effect: no late_cycle is given"),
        ({"selection": {"clustering": "kmeans"}}, "clustering='kmeans' has no effect: clusters is 0"),
        ({"cycle": (0, 1), "keys_values": "none"}, "keys_values='none' has no effect: .* 0, 1"),
        ({"cycle": (0, 1), "selection": {"clusters": 4}}, "clusters=4 has no effect"),
        ({"cycle": (0, 1), "selection": {"score": "age"}}, "score='age' has no effect"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        Config(**settings)


def test_settings_that_say_the_same_twice():
    assert Config.cat(0.4).budget == 0.4
    Config(budget=0.3, schedule=Schedule(cycle=(0, 1), late_cycle=(0, 0.3)))
    Config(schedule=Schedule(cycle=(0, 1), late_cycle=(0, 0.3), late_from=0.4), keys_values="none")


def test_a_refresh_that_is_not_there_is_named():
    with pytest.raises(accel.errors.UnknownNameError, match=r"refresh.*refresh_every"):
        accel.configs.load({"method": "token_pruning", "refresh": 0})


def refused(match, pipe=None, config=None, **options):
    pipe = pipe or make_flux()
    with accel.accelerate(pipe, config or Config()), pytest.raises(UnsupportedError, match=match):
        FAMILIES["flux"].latents(pipe, **options)


def test_more_clusters_than_tokens(family):
    pipe, calls = family.make(), []
    # The attention: the block's own hooks come before the refusal.
    inside = next(m for name, m in pipe.transformer.named_modules() if name.endswith((".attn", ".attn1")))
    inside.register_forward_pre_hook(lambda m, args: calls.append(1))
    with accel.accelerate(pipe, Config(selection=Selection(clusters=97))):
        with pytest.raises(
            UnsupportedError, match=r"clusters=97 are more than the 96 tokens.*valid: 0 to 96"
        ):
            family.latents(pipe)
        assert not calls  # before anything is computed
        family.latents(pipe, height=40)


def test_more_clusters_than_tokens_in_compiled_code():
    pipe = make_flux(1, 1)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    refused("clusters=97 are more than the 96 tokens", pipe, config=Config(selection=Selection(clusters=97)))


def test_a_heun_scheduler():
    pipe = make_flux()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with accel.accelerate(pipe, Config()), pytest.raises(UnsupportedError, match="FlowMatchHeun"):
        pipe.scheduler.set_timesteps(6)


def test_controlnet_residuals():
    pipe = make_flux()
    residual = {"controlnet_block_samples": [torch.zeros(1, 96, 32)] * 2}
    pipe.transformer.register_forward_pre_hook(lambda m, a, k: (a, {**k, **residual}), with_kwargs=True)
    refused("controlnet_block_samples", pipe)


def test_ip_adapter_masks():
    refused("ip_adapter_masks", joint_attention_kwargs={"ip_adapter_masks": [torch.ones(1, 1, 8, 12)]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(1, 1, 8, 12)]}}, "ip_adapter_masks"),
        ({"cross_attention_kwargs": {"gligen": {}}}, "gligen"),
        ({"attention_mask": torch.ones(1, 96)}, "attention_mask: a mask over the image tokens"),
    ],
)
def test_what_says_something_about_positions_in_pixart(arguments, message):
    """Its transformer takes no residuals of a ControlNet; what it takes comes past the pipeline, as here."""
    pipe, family = make_pixart(), FAMILIES["pixart"]
    pipe.transformer.register_forward_pre_hook(lambda m, a, k: (a, {**k, **arguments}), with_kwargs=True)
    calls: list[int] = []
    pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *_: calls.append(1))
    with accel.accelerate(pipe, Config(keys_values="none")), pytest.raises(UnsupportedError, match=message):
        family.latents(pipe)
    assert not calls  # not after minutes of dense steps


def test_fused_projections():
    pipe = make_flux()
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(UnsupportedError, match=r"fused projections.*keys_values='none'"):
        accel.accelerate(pipe, Config())
    with accel.accelerate(pipe, Config(keys_values="none")):
        FAMILIES["flux"].latents(pipe)


class OwnValues:
    """An attention processor that makes its values without the module that was hooked."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, attn, *args, **kwargs):
        hooked, attn.to_v = attn.to_v, torch.nn.Linear(32, 32)
        attn.to_v.load_state_dict(hooked.state_dict())
        try:
            return self.inner(attn, *args, **kwargs)
        finally:
            attn.to_v = hooked


def test_an_attention_that_goes_its_own_way():
    pipe = make_flux()
    attention = pipe.transformer.transformer_blocks[0].attn
    attention.set_processor(OwnValues(attention.processor))
    config = Config(dense_steps_first=1, cycle=(0.5,))
    with accel.accelerate(pipe, config), pytest.raises(UnsupportedError, match="9 of 10 projections"):
        FAMILIES["flux"].latents(pipe)
