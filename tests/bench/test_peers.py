"""The comparison's own work: which settings run, and what is said about the others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from accel.bench import peers
from accel.bench.compare import PROBLEMS, _report, try_out
from accel.evaluation.configurations import PLAIN, Configuration, resolve


def pipe(calls, fail=()):
    def run(prompt, **call):
        calls.append(call)

    def enable(config):
        if type(config).__name__ in fail:
            raise ValueError("no such block")

    run.transformer = SimpleNamespace(enable_cache=enable, disable_cache=lambda: calls.append("off"))
    return run


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
    working, problems = try_out(
        pipe(calls, fail=("FirstBlockCacheConfig",)), [gone, broken, works, half], "a photo", {"height": 8}
    )
    assert working == [works, half]
    assert problems["gone"] == "skipped: no_such_package is not installed (pip install 'accel-image[bench]')"
    assert problems["broken"] == "ValueError: no such block"
    assert calls[1] == "off"  # the peer left the pipeline as it was
    assert (calls[0]["height"], calls[2]["num_inference_steps"]) == (8, 2)


def test_problems_stand_in_the_report(tmp_path, monkeypatch):
    page = tmp_path / "report" / "index.html"
    page.parent.mkdir()
    page.with_name("report.md").write_text("# Report\n")
    monkeypatch.setattr("accel.bench.compare.report", lambda path: page)
    written = _report(SimpleNamespace(path=tmp_path), ["a", "b"], {"b": "TypeError: no"})
    assert written.read_text().endswith("## Settings that did not run\n\n- `b`: TypeError: no\n")
    assert "TypeError" in (tmp_path / PROBLEMS).read_text()
