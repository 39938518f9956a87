"""The stages from the command line."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from accel.cli import bench as cli_bench
from accel.cli import evaluate as cli_evaluate
from accel.errors import AccelError, AccelWarning
from accel.evaluation import metrics
from accel.evaluation.errors import EvaluationError, WeightsError
from accel.evaluation.features import FeatureSet
from accel.evaluation.models import load_pipeline


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


def invoke(*command):
    return CliRunner().invoke(cli_evaluate.app, [str(part) for part in command], catch_exceptions=False)


@pytest.fixture
def own(tmp_path):
    """Options of a run with a pipeline and prompts of one's own."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    model = f"{Path(__file__).with_name('fake_pipeline.py')}:make"
    return ["--model", model, "--suite", tmp_path / "prompts.txt"]


def test_what_cannot_be_called_is_said_before_a_folder_is_made(tmp_path, own, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options, says in (
        (["--guidance", 3], "FakePipeline takes no 'guidance_scale'"),
        (["--size", 64], "FakePipeline takes no 'width'"),
        (["--size", 250], "250x250 is not divisible by 8"),
        (["--device", "cuda"], "--device cuda: no CUDA here"),
        (["-c", "balanced"], "expected a diffusers pipeline"),
    ):
        with pytest.raises(AccelError, match=says):
            invoke("run", tmp_path / "r", *own, *options)
        assert not (tmp_path / "r").exists()
    for option in ("--steps", "--limit", "--samples", "--batch-size"):
        assert invoke("run", tmp_path / "r", *own, option, 0).exit_code == 2
    assert not (tmp_path / "r").exists()


def test_a_dtype_that_is_ignored_is_said(tmp_path, own):
    with pytest.warns(AccelWarning, match=r"chooses its own dtype; bfloat16 is ignored"):
        load_pipeline(own[1], dtype="bfloat16")


def test_a_damaged_image_is_named_once(tmp_path, own):
    for made in (2, 0):  # the second start finds everything done, and says so
        said = " ".join(invoke("run", tmp_path / "r", *own).stderr.split())
        assert f"{made} images made, 2 in" in said
    (tmp_path / "r/images/plain/00001/samples/0000.png").write_bytes(b"")
    with pytest.warns(AccelWarning, match=r"00001/samples/0000\.png: image is truncated") as caught:
        invoke("score", tmp_path / "r")
    assert len(caught) == 1


def test_reference_images_are_looked_for_first_and_never_ignored(tmp_path, own):
    with pytest.raises(EvaluationError, match="no reference images"):
        invoke("all", tmp_path / "r", *own, "--extractor", "scenes", "--reference", tmp_path / "absent")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(EvaluationError, match="--reference needs --extractor"):
        invoke("all", tmp_path / "r", *own, "--reference", tmp_path)
    assert not (tmp_path / "r").exists()


def test_no_clip_score_of_file_names(tmp_path, own):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures/IMG_0001.png")
    with pytest.raises(EvaluationError, match=r"these images came without: .*metadata\.jsonl"):
        invoke("score", tmp_path / "s", "--images", f"a={tmp_path / 'pictures'}", "--clip", "absent")


def test_a_moved_run_keeps_its_ground_truth(tmp_path, own):
    """Its features lie beside it: they are of the same pictures, wherever the folder is."""
    options = [*own[:2], "--per-task", 1]
    assert invoke("all", tmp_path / "a", *options, "--limit", 2).exit_code == 0
    (tmp_path / "a").rename(tmp_path / "b")
    summary = json.loads(invoke("all", tmp_path / "b", *options, "--limit", 5, "--json").stdout)
    (row,) = summary["distances"]
    assert (row["to"], row["n"]) == ("reference", 5)
    assert row["extractor"].startswith("scenes@")  # without --extractor: this suite's own


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
    command = [
        "few-step",
        str(tmp_path / "r"),
        "--model",
        "absent.py:make",
        "--lpips",
        "/nowhere/alexnet.pth",
    ]
    with pytest.raises(WeightsError, match="no such weight file"):
        CliRunner().invoke(cli_bench.app, command, catch_exceptions=False)
    assert not (tmp_path / "r").exists()
