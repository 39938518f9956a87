"""The comparison's own work: which settings run, and what is said about the others."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import flux_call, make_flux

from accel import configs
from accel.core import weighted_attention
from accel.evaluation.bench import peers
from accel.evaluation.bench.compare import PROBLEMS, _report, try_out
from accel.evaluation.configurations import PLAIN, Configuration, resolve
from accel.pipelines import builtin


class Denoiser(torch.nn.Module):
    def forward(self, x):
        return x @ x


def pipe(calls, fail=()):
    def run(prompt, **call):
        calls.append(call)
        run.transformer(torch.ones(4, 4))

    def enable(config):
        if type(config).__name__ in fail:
            raise ValueError("no such block")

    run.transformer = Denoiser()
    run.transformer.enable_cache = enable
    run.transformer.disable_cache = lambda: calls.append("off")
    run.scheduler = SimpleNamespace()
    return run


@pytest.mark.parametrize("steps", [4, 7, 24, 50])
def test_every_setting_of_ours_leaves_something_out(steps):
    for item in peers.ours(steps):
        assert any(p.budget < 1 or not p.guided for p in item.method.full_schedule.phases(steps)), item.name


@pytest.mark.parametrize("steps", [4, 24, 50])
def test_settings_have_distinct_names_and_hashes(steps):
    every = resolve([*peers.fewer_steps(steps), *peers.theirs(steps), *peers.ours(steps)])
    assert every[0].name == PLAIN
    assert sum(c.is_plain for c in every) == 1
    assert {c.kind for c in every if isinstance(c, peers.Peer)} == set(peers.ENABLE)
    assert all(c.steps is None or c.steps < steps for c in every)


def test_a_missing_peer_is_named_and_a_failing_one_reported():
    gone = peers.Peer("gone", package="no_such_package", kind="cache-dit")
    broken = peers.Peer("broken", package="diffusers", kind="FirstBlockCache", options={"threshold": 0.1})
    works = peers.Peer("works", package="diffusers", kind="TaylorSeer", options={"cache_interval": 3})
    half = Configuration("steps=2", steps=2)
    calls: list = []
    working, problems, macs = try_out(
        pipe(calls, fail=("FirstBlockCacheConfig",)), [gone, broken, works, half], "a photo", {"height": 8}
    )
    assert working == [works, half]
    assert problems["gone"] == "skipped: no_such_package is not installed (pip install 'accel-image[bench]')"
    assert problems["broken"] == "ValueError: no such block"
    assert macs == {"works": 64, "steps=2": 64}  # 4 x 4 x 4
    assert calls[1] == "off"  # the peer left the pipeline as it was
    assert (calls[0]["height"], calls[2]["num_inference_steps"]) == (8, 2)


def test_what_finding_the_form_of_attention_takes_is_not_counted(monkeypatch):
    monkeypatch.setattr(weighted_attention, "_CHOSEN", {})
    half = configs.load("few-step")
    settings = [Configuration(name, half) for name in ("first", "again")]
    call = {name: value for name, value in flux_call(steps=4).items() if name != "generator"}
    _, problems, macs = try_out(make_flux(), settings, None, call)
    assert problems == {}
    assert macs["first"] == macs["again"] > 0
    assert weighted_attention.chosen()


def test_problems_stand_in_the_report(tmp_path, monkeypatch):
    page = tmp_path / "report" / "index.html"
    page.parent.mkdir()
    page.with_name("report.md").write_text("# Report\n")
    monkeypatch.setattr("accel.evaluation.bench.compare.report", lambda path: page)
    macs = {"plain": 4 * 10**9, "a": 10**9}
    written = _report(SimpleNamespace(path=tmp_path), ["a", "b"], {"b": "TypeError: no"}, macs)
    assert "| a | 1.0 | 0.250 |" in written.read_text()
    assert written.read_text().endswith("## Settings that did not run\n\n- `b`: TypeError: no\n")
    assert "TypeError" in (tmp_path / PROBLEMS).read_text()


def state_of(pipe):
    """What a peer could leave behind: attributes and hooks of every module, of the pipeline and of classes."""
    modules = {
        name: (set(vars(m)), vars(m).get("forward"), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in pipe.transformer.named_modules()
    }
    classes = {*type(pipe).__mro__, *(c for m in pipe.transformer.modules() for c in type(m).__mro__)}
    methods = {(c, k): id(v) for c in classes for k, v in vars(c).items() if callable(v)}
    return modules, methods, set(vars(pipe)), set(vars(pipe.scheduler))


LOOSE = {"FirstBlockCache": {"threshold": 10.0}}


@pytest.mark.parametrize("kind", sorted(peers.ENABLE))
def test_peers_leave_the_plain_pipeline_as_it_was(kind):
    settings = [p for p in peers.theirs(8) if p.kind == kind and "calibrated" not in p.options][-2:]
    # A threshold that random weights reach.
    settings = [replace(p, options={**p.options, **LOOSE.get(kind, {})}) for p in settings]
    if settings[0].missing:
        pytest.skip(f"{settings[0].package} is not installed")
    # A subclass, as the built-in pipeline is: cache-dit then works on a pipeline of its own making.
    pipe = type("Subclass", (type(make_flux()),), {})(**make_flux().components)
    pipe.set_progress_bar_config(disable=True)

    def latents():
        return pipe(**flux_call(guidance=3.0, steps=8)).images

    plain, transformer, before = latents(), pipe.transformer, state_of(pipe)
    weights = [p.data_ptr() for p in transformer.parameters()]
    changed = False
    for setting in settings:
        with setting.attach(pipe):
            assert [p.data_ptr() for p in pipe.transformer.parameters()] == weights  # nothing is held twice
            changed = changed or not torch.equal(latents(), plain)
        assert pipe.transformer is transformer
        assert state_of(pipe) == before
        assert torch.equal(latents(), plain)
    # The negative control: the peer was at work.
    assert changed


def test_magcache_is_calibrated_once_on_the_model_itself():
    calls = []
    pipe = builtin.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    transformer, before = pipe.transformer, state_of(pipe)
    handle = transformer.register_forward_hook(lambda *_: calls.append(1))
    setting = next(p for p in peers.theirs(3) if "calibrated" in p.options)
    for _ in range(2):
        with setting.attach(pipe):
            hooks = pipe.transformer.transformer_blocks[0]._diffusers_hook.hooks
            (config,) = {id(h.config): h.config for h in hooks.values() if hasattr(h, "config")}.values()
            ratios = config.mag_ratios.tolist()
        assert ratios[0] == 1
        assert len(set(ratios)) == len(ratios) == 3
    handle.remove()
    assert len(calls) == 6  # three steps, two branches, one calibration
    assert pipe.transformer is transformer
    assert state_of(pipe)[:2] == before[:2]


def test_with_a_side_car_windows_are_compared_upcycled_too():
    settings = {s.name: s.method for s in peers.few_step(4, Path("car.safetensors"))}
    for name, other in (
        ("upcycled-few-step", "few-step"),
        ("upcycled-50", "windows-50"),
        ("upcycled-33-33-0", "mixed-33-33-0"),
    ):
        assert settings[name] == replace(settings[other], adapter="car.safetensors")
    assert not any("matching" in name or "copy" in name for name in settings if name.startswith("upcycled"))
    assert {"upcycled-20", "upcycled-few-step-fast"} <= set(settings)


@pytest.mark.parametrize("steps", [4, 6, 8])
def test_few_steps_are_compared_with_what_people_use_and_one_schedule_for_both(steps):
    settings = peers.few_step(steps)
    names = [s.name for s in settings]
    assert len(set(names)) == len(names)
    assert {
        "few-step",
        "few-step-fast",
        "matching-50",
        "windows-25",
        "tomesd",
        "fbc-0.1",
        f"steps={steps // 2}",
        "cosine-50",
        "predictability-50",
    } <= set(names)
    assert not any(name.startswith("upcycled") for name in names)
    left_out = [s for s in settings if re.fullmatch(r"forecast(-\d)+", s.name)]
    assert len(left_out) >= 2
    for setting in left_out:
        budgets = [phase.budget for phase in setting.method.full_schedule.phases(steps)]
        assert [step for step, budget in enumerate(budgets) if budget == 0] == [
            int(step) for step in setting.name.split("-")[1:]
        ]
    mixed = [s for s in settings if s.name.startswith("mixed-")]
    assert len(mixed) >= 2
    for setting in mixed:
        phases = setting.method.full_schedule.phases(steps)
        shares = [round(100 * phase.budget) for phase in phases]
        wanted = [{"1": 100}.get(part, int(part)) for part in setting.name.split("-")[1:]]
        assert shares == [100, *wanted]
