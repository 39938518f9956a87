"""Shared by the evaluation tests: a small prompt suite and the fake pipeline."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from accel.evaluation.suites import Prompt, Suite


def _load_fake():
    spec = importlib.util.spec_from_file_location(
        "fake_pipeline", Path(__file__).with_name("fake_pipeline.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fake():
    return _load_fake().FakePipeline()


@pytest.fixture
def suite():
    return Suite("prompts", [Prompt(i, f"prompt {i}") for i in range(6)])


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    """The tests may themselves run under a launcher."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
