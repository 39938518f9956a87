"""A comparison as a whole: folders that do not fit, starts that continue others, and peers that break late."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from accel.evaluation.bench.compare import MACS, PROBLEMS, compare
from accel.evaluation.bench.peers import Peer
from accel.evaluation.configurations import PLAIN, Configuration
from accel.evaluation.errors import RecordError
from accel.evaluation.folder import RunFolder
from accel.evaluation.scorers import PairScorer
from accel.evaluation.suites import Prompt, Suite

SUITE = Suite("prompts", [Prompt(i, f"prompt {i}") for i in range(4)])
HALF, QUARTER = Configuration("steps=2", steps=2), Configuration("steps=1", steps=1)


class Denoiser(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ x.flip(-1) / 64


class Pipe:
    """Called like diffusers' pipelines; `breaks_on` is a prompt that raises."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        self.transformer, self.scheduler = Denoiser(), SimpleNamespace()
        self.calls: list[str] = []
        self.breaks_on: str | None = None
        self.shift = 0.0

    def __call__(self, prompt, *, generator, output_type="pil", num_inference_steps=4):
        prompts = [prompt] if isinstance(prompt, str) else prompt
        self.calls += prompts
        if self.breaks_on in prompts:
            raise ValueError("shapes do not match\n(second line)")
        own = generator[0] if isinstance(generator, list) else generator
        x = torch.rand(16, 16, generator=own) + self.shift
        for _ in range(num_inference_steps):
            x = x + self.transformer(x)
        pixels = (x.clamp(0, 4) * 60).byte()[..., None].expand(16, 16, 3).contiguous()
        return SimpleNamespace(images=[Image.fromarray(pixels.numpy())])


@dataclass(frozen=True)
class Theirs(Peer):
    breaks_on: str | None = None

    @contextmanager
    def attach(self, pipe: Any) -> Iterator[None]:
        pipe.breaks_on, pipe.shift = self.breaks_on, 0.1
        try:
            yield
        finally:
            pipe.breaks_on, pipe.shift = None, 0.0


def theirs(name: str, breaks_on: str | None = None, package: str = "json") -> Theirs:
    return Theirs(name, package=package, kind=name, breaks_on=breaks_on)


def start(path, configurations, pipe=None, **change):
    arguments = {"call": {"num_inference_steps": 4}, "model": "tiny", "limit": 3, **change}
    return compare(path, pipe or Pipe(), SUITE, configurations, **arguments).read_text()


def test_a_folder_that_does_not_fit_is_found_before_anything_is_tried(tmp_path):
    pipe = Pipe()
    (tmp_path / "file").touch()
    with pytest.raises(RecordError, match="cannot be a run folder"):
        start(tmp_path / "file", [HALF], pipe)
    start(tmp_path / "r", [HALF])
    for change in ({"seed": 1}, {"call": {"num_inference_steps": 8}}):
        with pytest.raises(RecordError, match="use another folder"):
            start(tmp_path / "r", [HALF], pipe, **change)
    with pytest.raises(RecordError, match="'steps=2' was started with other settings"):
        start(tmp_path / "r", [Configuration("steps=2", steps=3)], pipe)
    assert pipe.calls == []


def test_what_has_all_images_is_not_tried_again(tmp_path):
    start(tmp_path / "r", [HALF])
    pipe = Pipe()
    before = json.loads((tmp_path / "r" / MACS).read_text())
    start(tmp_path / "r", [HALF], pipe)
    assert pipe.calls == []
    assert json.loads((tmp_path / "r" / MACS).read_text()) == before
    start(tmp_path / "r", [HALF, QUARTER], pipe)
    assert pipe.calls == [
        "prompt 0",
        *(f"prompt {i}" for i in range(3)),
    ]  # the try, and the images, of steps=1
    pipe.calls.clear()
    start(tmp_path / "r", [HALF, QUARTER], pipe, limit=4)
    assert pipe.calls == ["prompt 0"] * 3 + ["prompt 3"] * 3  # an image is missing of each
    pipe.calls.clear()
    (tmp_path / "r" / MACS).write_text(json.dumps({PLAIN: before[PLAIN]}))
    start(tmp_path / "r", [HALF], pipe, limit=4)
    assert pipe.calls == ["prompt 0"]  # to count again


def test_a_peer_that_breaks_on_a_later_prompt_is_reported_and_the_others_go_on(tmp_path):
    page = start(tmp_path / "r", [theirs("whole"), theirs("fragile", breaks_on="prompt 1"), HALF])
    why = "ValueError: shapes do not match\n(second line) (on 'prompt 1')"
    assert json.loads((tmp_path / "r" / PROBLEMS).read_text()) == {"fragile": why}
    assert f"- `fragile`: {' '.join(why.split())}" in page
    assert "Configuration fragile failed and is left out with its 1 images" in page
    assert "| fragile |" not in page
    # Its one image would otherwise be all that is compared.
    summary = json.loads((tmp_path / "r/report/report.json").read_text())
    assert (summary["images"], [row["name"] for row in summary["configurations"]]) == (
        3,
        [PLAIN, "whole", "steps=2"],
    )
    # Tried again, it works, and is reported like the others.
    page = start(tmp_path / "r", [theirs("fragile")])
    assert json.loads((tmp_path / "r" / PROBLEMS).read_text()) == {}
    assert "| `fragile` | peers | " in page


@pytest.mark.parametrize("ours", [HALF, Configuration(PLAIN)])
def test_an_error_of_ours_stops_the_comparison(tmp_path, ours):
    class Breaks(Pipe):
        def __call__(self, prompt, **arguments):
            if arguments["num_inference_steps"] == (ours.steps or 4) and prompt == ["prompt 1"]:
                raise RuntimeError("out of memory")
            return super().__call__(prompt, **arguments)

    with pytest.raises(RuntimeError, match="out of memory"):
        start(tmp_path / "r", [HALF, theirs("whole")], Breaks())


def test_the_plain_pipeline_has_to_work(tmp_path):
    pipe = Pipe()
    pipe.breaks_on = "prompt 0"
    with pytest.raises(ValueError, match="shapes do not match"):
        start(tmp_path / "r", [HALF, QUARTER], pipe)
    assert pipe.calls == ["prompt 0"]


def test_what_a_continued_folder_has_of_other_settings_stays(tmp_path):
    start(tmp_path / "r", [HALF, theirs("whole"), theirs("gone", package="no_such_package")])
    page = start(tmp_path / "r", [QUARTER])
    every = page.split("## All settings")[1].split("\n## ")[0]
    assert "| `steps=2` | fewer steps | " in every
    assert "| `whole` | peers | " in every
    assert "- `gone`: skipped: no_such_package is not installed" in page
    assert set(json.loads((tmp_path / "r" / PROBLEMS).read_text())) == {"gone"}
    assert set(json.loads((tmp_path / "r" / MACS).read_text())) == {PLAIN, "steps=2", "whole", "steps=1"}
    # Its images were not timed beside plain's: it has no speedup, and the page says so.
    assert "Not in these tables: `steps=1`. They were not timed in one start with the plain pipeline" in every
    # The folder alone is enough, too, for a package that is not there any more.
    pipe = Pipe()
    page = start(tmp_path / "r", [HALF, theirs("whole", package="no_such_package")], pipe)
    assert "| `whole` | peers | " in page
    assert pipe.calls == []


def test_the_page_says_what_it_was_made_with(tmp_path):
    page = start(tmp_path / "r", [HALF])
    assert 'data-name="steps=2"' in (tmp_path / "r/report/frontier.svg").read_text()
    line = next(line for line in page.splitlines() if line.startswith("Made with:"))
    assert "model tiny, dtype float32; num_inference_steps 4; 3 prompts; threads " in line
    session = next(RunFolder(tmp_path / "r").sessions())
    assert f"threads {session['threads']}; torch {torch.__version__}, diffusers " in line
    assert "cache-dit" in line


def test_scorers_beside_the_usual_ones_get_a_column(tmp_path):
    largest = PairScorer("largest", lambda a, b: (a - b).abs().amax((1, 2, 3)), higher_is_better=False)
    assert "largest" not in start(tmp_path / "without", [HALF])
    page = start(tmp_path / "with", [HALF], scorers=[largest])
    assert "largest" in page
    summary = json.loads((tmp_path / "with" / "report" / "report.json").read_text())
    values = {row["name"]: row["metrics"].get("largest") for row in summary["configurations"]}
    assert values["steps=2"]["mean"]["value"] > 0
