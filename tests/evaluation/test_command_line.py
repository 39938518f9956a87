"""The stages from the command line."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from accel import cli_evaluate
from accel.evaluation import metrics
from accel.evaluation.errors import WeightsError
from accel.evaluation.features import FeatureSet


def test_one_command_runs_scores_and_reports_with_ground_truth_as_reference(tmp_path):
    """`all` on the scenes suite: an extractor without a reference folder is measured to ground truth."""
    from safetensors.torch import save_file

    from accel.evaluation.extractors.scenes import ScenesNet

    torch.manual_seed(0)
    save_file(ScenesNet().state_dict(), tmp_path / "w.safetensors")
    command = ["all", tmp_path / "r", "-c", "steps=4", "--per-task", 1, "--samples", 2, "--json"]
    command += ["--model", f"{Path(__file__).with_name('fake_pipeline.py')}:make", "--batch-size", 3]
    command += ["--extractor", f"scenes:{tmp_path / 'w.safetensors'}"]
    result = CliRunner().invoke(cli_evaluate.app, [str(part) for part in command], catch_exceptions=False)
    assert result.exit_code == 0
    summary = json.loads(result.stdout)
    assert summary["run"]["batch_size"] == 3
    assert summary["suite_metric"] == "scenes"
    assert summary["bounds"]["ceiling"]["overall"]["value"] == 1.0
    found = {(d["configuration"], d["to"], d.get("source"), d["n"]) for d in summary["distances"]}
    assert found == {
        ("steps=4", "plain", None, 12),
        ("plain", "reference", "ground-truth", 12),
        ("steps=4", "reference", "ground-truth", 12),
    }
    # Ground truth is of the same prompts: its pictures are pairs of the run's.
    store = next((tmp_path / "r/features").iterdir())
    sets = [torch.cat(list(FeatureSet(store, name).batches())).numpy() for name in ("reference", "plain")]
    expected = metrics.kernel_inception_distance(*sets, paired=True).value
    row = next(d for d in summary["distances"] if (d["configuration"], d["to"]) == ("plain", "reference"))
    assert row["kid"] == pytest.approx(expected)
    assert row["kid"] != pytest.approx(metrics.kernel_inception_distance(*sets).value)
    drawn = {f.name: f.read_bytes() for f in (tmp_path / "r/ground-truth").iterdir()}
    assert len(drawn) == len(set(drawn.values())) == 12


def test_all_takes_every_option_of_its_stages():
    def options(command):
        return {name: p.default for name, p in inspect.signature(command).parameters.items()}

    together = options(cli_evaluate.all_command)
    assert together["batch_size"] == 1  # `run`'s; that of `score` is another thing
    stages = cli_evaluate.run_command, cli_evaluate.score_command, cli_evaluate.report_command
    for command in stages:
        rest = {
            name: v for name, v in options(command).items() if name not in ("verify", "images", "batch_size")
        }
        assert rest.items() <= together.items()


def test_weights_that_are_missing_are_named_before_anything_is_generated(tmp_path):
    for option, value, says in (
        ("--extractor", "inception:/nowhere/i.pt", r"i\.pt: no such weight file; expected SHA-256 f58cb9b6"),
        ("--lpips", "/nowhere/alexnet.pth", r"alexnet\.pth: no such weight file; .*download\.pytorch\.org"),
        ("--extractor", "scenes:/nowhere/w.safetensors", "the scenes extractor's weights are missing"),
    ):
        command = ["all", str(tmp_path / "r"), "--model", "absent.py:make", option, value]
        with pytest.raises(WeightsError, match=says):
            CliRunner().invoke(cli_evaluate.app, command, catch_exceptions=False)
    assert not (tmp_path / "r").exists()
