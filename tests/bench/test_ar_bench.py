"""`accel bench ar` on a checkpoint with random weights: are its numbers what the records say?"""

from __future__ import annotations

import csv
import json
import math
from xml.etree import ElementTree

import numpy as np
import pytest
import tiny_janus
import torch

from accel.evaluation import suites
from accel.evaluation.bench import autoregressive as bench
from accel.evaluation.bench.autoregressive_report import speedup
from accel.evaluation.configurations import PLAIN, Configuration, resolve
from accel.evaluation.errors import EvaluationError
from accel.evaluation.folder import RunFolder, sample_key
from accel.generation import load_pipeline
from accel.pipelines.autoregressive import AutoregressivePipeline

pytestmark = pytest.mark.filterwarnings("ignore:speculative decoding does not pay")

TOKENS, PROMPTS = 16, 6
NAMES = {PLAIN, "transformers", "plain-again", "sjd", "lossless-4", "lossless-auto", "grouped-4", "gsd-4"}


class Stop(Exception):
    pass


def run(folder, pipe, **options):
    chosen = [c for c in bench.settings(window=4, windows=(4,), groups=(4,)) if c.name in NAMES]
    options = {"limit": PROMPTS, "batch_sizes": (1, 2), "repeats": 1, **options}
    return bench.bench(folder, pipe, suites.scenes(), chosen, **options)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tiny_janus.save(tmp_path_factory.mktemp("janus"), tiny_janus.model(context=256))
    return load_pipeline(str(folder))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pipe):
    """A bench that was stopped in the middle and continued."""
    folder = tmp_path_factory.mktemp("bench") / "run"
    seen = []

    def stop(state):
        seen.append(state)
        if len(seen) == 20:
            raise Stop

    with pytest.raises(Stop):
        run(folder, pipe, progress=stop)
    return run(folder, pipe)


def rows_of(page):
    result = json.loads(page.with_suffix(".json").read_text())
    return result, {row["name"]: row for row in result["rows"]}


def test_every_image_is_made_once(finished, pipe, monkeypatch):
    folder = RunFolder(finished.parent.parent)
    lines = [
        json.loads(line) for f in (folder.path / "samples").iterdir() for line in f.read_text().splitlines()
    ]
    assert len(lines) == len({sample_key(line) for line in lines}) == PROMPTS * (len(NAMES) + 1)

    def called(*arguments, **options):
        raise AssertionError("a finished bench makes no images")

    monkeypatch.setattr(AutoregressivePipeline, "__call__", called)
    before = finished.read_text()
    assert run(folder.path, pipe).read_text() == before


def test_forwards_and_distances(finished):
    _, rows = rows_of(finished)
    assert set(rows) == {*NAMES, "mixture-as-grouped-4"}
    for name in (PLAIN, "transformers", "plain-again"):
        assert rows[name]["nfe"]["value"] == TOKENS
    for row in rows.values():
        assert 1 < row["nfe"]["value"] <= TOKENS
        assert row["nfe_gain"] == pytest.approx(TOKENS / row["nfe"]["value"])
        assert row["of_nfe_gain"] == pytest.approx(row["speedup"]["value"] / row["nfe_gain"])
        assert row["tokens_per_forward"]["value"] >= 1
    spent = {name: row["tv_per_token"]["value"] for name, row in rows.items()}
    assert {name for name, tv in spent.items() if tv > 0} == {"grouped-4", "gsd-4", "mixture-as-grouped-4"}
    assert spent["mixture-as-grouped-4"] == pytest.approx(spent["grouped-4"], rel=0.6)
    assert rows["lossless-4"]["identical"] == rows[PLAIN]["identical"] == PROMPTS
    assert rows["plain-again"]["identical"] == rows["transformers"]["identical"] == 0


def test_speedups_are_those_of_the_raw_samples(finished):
    result, rows = rows_of(finished)
    seconds: dict = {}
    for record in RunFolder(finished.parent.parent).samples():
        seconds.setdefault(record["configuration"], {})[record["prompt_id"]] = record
    for name, base in (("speedup", PLAIN), ("speedup_over_transformers", "transformers")):
        for way, row in rows.items():
            own = seconds[way]
            logs = [
                math.log(seconds[base][prompt]["seconds"] / own[prompt]["seconds"])
                for prompt in own
                if seconds[base][prompt]["session"] == own[prompt]["session"]
            ]
            assert row[name]["value"] == pytest.approx(math.exp(np.mean(logs)))
            assert row[name]["n"] == len(logs)
            if way == base:  # its ratio to itself is 1, of which nothing is estimated
                assert (row[name]["low"], row[name]["reason"]) == (None, "all equal")
            else:
                assert row[name]["low"] <= row[name]["value"] <= row[name]["high"]
    assert rows[PLAIN]["speedup"]["value"] == rows["transformers"]["speedup_over_transformers"]["value"] == 1
    assert rows["sjd"]["seconds"]["median"] == pytest.approx(
        np.median([record["seconds"] for record in seconds["sjd"].values()])
    )
    with open(finished.with_suffix(".csv"), newline="") as file:
        table = {row["name"]: row for row in csv.DictReader(file)}
    assert float(table["sjd"]["speedup_value"]) == rows["sjd"]["speedup"]["value"]

    sizes = {(row["batch_size"], row["name"]): row for row in result["batch_sizes"]}
    two = RunFolder(finished.parent.parent / "batch-sizes" / "002")
    per_image = [r["seconds"] for r in two.samples() if r["configuration"] == "grouped-4"]
    assert sizes[2, "grouped-4"]["images_per_second"] == pytest.approx(1 / per_image[0])
    assert sizes[2, "grouped-4"]["speedup"]["n"] == 1  # one call, although two images
    assert (2, "sjd") not in sizes


def test_the_page_has_what_is_needed_to_believe_it(finished):
    result, rows = rows_of(finished)
    text = finished.read_text()
    for part in (
        "| transformers |",
        "Score's ceiling",
        "Score's floor",
        "same task): not",
        "source revision",
        "## Batch sizes",
    ):
        assert part in text
    for name, drawn in (
        ("trade-off", set(rows)),
        ("batch-sizes", {row["name"] for row in result["batch_sizes"]}),
    ):
        assert f"![{name}]({name}.svg)" in text
        tree = ElementTree.fromstring(finished.with_name(f"{name}.svg").read_text())
        points = {part.get("data-name") for part in tree.iter() if part.get("data-name")}
        assert points
        assert points <= drawn
    assert rows["sjd"]["score"]["n"] == PROMPTS
    assert result["bounds"]["ceiling"]["overall"]["value"] > 0.9
    assert rows["sjd"]["fid"] is None or rows["sjd"]["fid"]["n"] == PROMPTS


def test_transformers_draws_from_the_same_distribution(pipe):
    """Greedy, it is ours; with the sampling that the call asks for, and not its own defaults."""
    prompts, generators = ["a red circle", "two"], [torch.Generator().manual_seed(seed) for seed in (1, 2)]

    def images(configuration, **arguments):
        made = configuration.generate(pipe, prompts, generators, arguments)
        return np.stack([np.asarray(image) for image in made])

    plain, theirs = Configuration(PLAIN), bench.Transformers("transformers")
    greedy = images(plain, temperature=0)
    for arguments in ({"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}):
        assert (images(theirs, **arguments) == greedy).all()
    assert (
        images(theirs, temperature=0, guidance_scale=1.0) == images(plain, temperature=0, guidance_scale=1)
    ).all()
    assert (images(theirs) != greedy).any()


def test_a_call_of_several_images_is_one_measurement():
    def record(session, seconds):
        return {"session": session, "seconds": seconds}

    base = {(0, 0): record("a", 4.0), (1, 0): record("a", 4.0), (2, 0): record("b", 9.0)}
    own = {(0, 0): record("a", 2.0), (1, 0): record("a", 2.0), (2, 0): record("c", 1.0)}
    found = speedup(base, own)
    assert (found["value"], found["n"]) == (pytest.approx(2.0), 1)  # different sessions are not compared


def test_settings_are_distinct_and_what_cannot_run_is_named(pipe):
    every = resolve(bench.settings(groups=(4, 128)))
    refused = bench.refused(pipe, every)
    assert set(refused) == {"gsd-128", "grouped-128"}
    assert "vocabulary of 64" in refused["gsd-128"]


def test_other_pipelines_are_refused(tmp_path):
    with pytest.raises(EvaluationError, match="autoregressive"):
        bench.bench(tmp_path / "run", object(), suites.scenes(), bench.settings())
