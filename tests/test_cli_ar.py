"""The command line with autoregressive models, on a checkpoint with random weights: 16 tokens an image."""

import json
import re
from pathlib import Path

import pytest
import tiny_janus
import torch
from PIL import Image
from test_cli import accel, pixels

from accel.evaluation.folder import RunFolder
from accel.pipelines import builtin

TOKENS = 16
WINDOWS = "method: speculative_decoding\nwindow: 4\nauto_disable: false\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_janus.save(tmp_path_factory.mktemp("janus"), tiny_janus.model(context=256))


@pytest.fixture
def windows(tmp_path):
    """Speculative decoding with fixed windows: what it does must not depend on how fast this machine is."""
    file = tmp_path / "windows.yaml"
    file.write_text(WINDOWS)
    return file


def generate(capsys, folder, *arguments):
    code, out, err = accel(capsys, "generate", "a red circle", "two", "--model", folder, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_plain_images_do_not_depend_on_their_batch(capsys, folder, tmp_path):
    rows = {}
    for batch in (1, 3):
        rows[batch] = generate(
            capsys, folder, "--num", 2, "--batch", batch, "--seed", 7, "--out", tmp_path / str(batch)
        )["images"]
    assert [row["seed"] for row in rows[1]] == [7, 8, 9, 10]
    assert [row["forwards"] for row in rows[3]] == [TOKENS] * 4
    assert rows[1][0]["tokens_per_forward"] == 1
    for one, three in zip(rows[1], rows[3], strict=True):
        assert torch.equal(pixels(one["file"]), pixels(three["file"]))
    assert not torch.equal(pixels(rows[1][0]["file"]), pixels(rows[1][1]["file"]))
    with Image.open(rows[1][2]["file"]) as image:
        assert (image.text["prompt"], image.text["seed"]) == ("two", "9")


def test_sampling_options_reach_the_model(capsys, folder, tmp_path):
    def images(name, *arguments):
        rows = generate(capsys, folder, "--out", tmp_path / name, *arguments)["images"]
        return [pixels(row["file"]) for row in rows]

    greedy = images("greedy", "--temperature", 0)
    for same in (("--top-k", 1), ("--top-p", 1e-6)):
        found = images("-".join(map(str, same)), *same)
        assert all(torch.equal(a, b) for a, b in zip(greedy, found, strict=True))
    for other in ((), ("--temperature", 0, "--guidance", 1)):
        found = images("-".join(map(str, other)) or "drawn", *other)
        assert not all(torch.equal(a, b) for a, b in zip(greedy, found, strict=True))


def test_compare_says_what_the_images_are(capsys, folder, tmp_path, windows):
    result = generate(capsys, folder, "--config", windows, "--compare", "--out", tmp_path / "lossless")
    for row in result["images"]:
        assert row["plain_forwards"] == TOKENS
        assert 1 < row["forwards"] <= TOKENS
        assert row["speedup"] == pytest.approx(row["plain_seconds"] / row["accelerated_seconds"])
        assert row["tv_per_token"] == 0
        assert row["identical"]
        assert "psnr" not in row
    assert result["summary"]["truth"] == "Lossless: all 2 images are the plain ones, pixel for pixel."
    assert len(list((tmp_path / "lossless").glob("*-compare.png"))) == 2

    windows.write_text(WINDOWS + "group_size: 16\n")
    summary = generate(capsys, folder, "--config", windows, "--compare", "--out", tmp_path / "grouped")[
        "summary"
    ]
    assert summary["tv_per_token"] > 0.001
    assert f"total variation of {summary['tv_per_token']:.4f}" in summary["truth"]

    windows.write_text(WINDOWS + "drafting: independent\n")
    truth = generate(capsys, folder, "--config", windows, "--compare", "--out", tmp_path / "sjd")["summary"][
        "truth"
    ]
    assert truth == "Lossless: other samples from the same distribution, not the same images as plain."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", 8], "--steps is for diffusion models; .*--preset grouped or lossless"),
        (
            ["--preset", "balanced"],
            "takes? SpeculativeDecodingConfig.*presets for this model: grouped, lossless",
        ),
        (["--size", 20], "8x8 pixels only"),
        (["--temperature", -1], "temperature must be a number >= 0"),
        (["--top-p", 2], r"top_p must be in \(0, 1\]"),
        (["--guidance", 0.5], "guidance must be at least 1"),
    ],
)
def test_what_does_not_fit_an_autoregressive_model(capsys, folder, tmp_path, arguments, message):
    code, _, err = accel(
        capsys, "generate", "two", "--model", folder, *arguments, "--out", tmp_path / "images"
    )
    assert code == 2
    assert re.search(message, err), err
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-k", 5, "--temperature", 1], "--temperature, --top-k is for autoregressive models.*--steps"),
        (["--preset", "lossless"], "autoregressive pipeline.*presets for this model: balanced"),
    ],
)
def test_what_does_not_fit_a_diffusion_model(capsys, tmp_path, arguments, message):
    code, _, err = accel(capsys, "generate", "a photo of a star", *arguments, "--out", tmp_path / "images")
    assert code == 2
    assert re.search(message, err), err


def test_a_class_that_no_adapter_knows(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["JanusForCausalLM"]}')
    code, _, err = accel(capsys, "generate", "two", "--model", tmp_path, "--out", tmp_path / "images")
    assert code == 2
    assert "JanusForConditionalGeneration" in err


@pytest.mark.parametrize("model", ["no/such/folder", "nobody/nothing"])
def test_a_model_that_is_not_there(capsys, tmp_path, monkeypatch, model):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = accel(capsys, "generate", "two", "--model", model, "--out", tmp_path / "images")
    assert code == 2
    assert model in err


def test_demo_on_the_built_in_model(capsys, folder, tmp_path, monkeypatch, windows):
    monkeypatch.setattr(builtin, "AUTOREGRESSIVE_FOLDER", folder)
    code, out, err = accel(capsys, "demo", "--ar", "--config", windows, "--out", tmp_path / "demo", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result == json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert [row["plain_forwards"] for row in result["images"]] == [TOKENS] * 4
    assert result["summary"]["truth"].startswith("Lossless")
    assert pixels(result["picture"]).shape[0] > 4 * 8
    code, _, err = accel(capsys, "demo", "--ar", "--steps", 4, "--out", tmp_path / "other")
    assert code == 2
    assert "--steps is for diffusion models" in err


def test_the_demo_names_what_is_missing(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(builtin, "AUTOREGRESSIVE_FOLDER", tmp_path / "gone")
    code, _, err = accel(capsys, "demo", "--ar", "--out", tmp_path / "demo")
    assert code == 2
    assert "train_scenes_ar.py" in err
    report = json.loads(accel(capsys, "info", "--json")[1])
    assert "train_scenes_ar.py" in report["builtin_ar"]


def test_info_knows_autoregressive_models(capsys):
    report = json.loads(accel(capsys, "info", "--json")[1])
    assert "JanusForConditionalGeneration" in report["autoregressive_models"]
    assert report["presets_by_method"]["speculative_decoding"] == ["grouped", "lossless"]
    assert "LlamaGen" in accel(capsys, "info")[1]


def test_evaluate_measures_forwards_and_makes_no_pairs(capsys, folder, tmp_path):
    out = tmp_path / "run"
    specs = ["-c", "same:lossless,window=4,auto_disable=false"]
    specs += ["-c", "loose:grouped,window=4,auto_disable=false,group_size=8"]
    code, _, err = accel(
        capsys, "evaluate", "run", out, "--model", folder, *specs, "--limit", 3, "--batch-size", 2
    )
    assert code == 0, err
    samples = list(RunFolder(out).samples())
    assert len(samples) == 9
    for record in samples:
        assert (record["forwards"] == TOKENS) == (record["configuration"] == "plain") or record[
            "forwards"
        ] < TOKENS
        assert (record["tv_per_token"] > 0) == (record["configuration"] == "loose")
        assert 0 < record["denoiser_seconds"] < record["seconds"]
    hashes = {(r["configuration"], r["prompt_id"]): r["image_sha256"] for r in samples}
    assert all(hashes["same", prompt] == hashes["plain", prompt] for _, prompt in hashes)

    assert accel(capsys, "evaluate", "score", out)[0] == 0
    assert {record["metric"] for record in RunFolder(out).scores()} == {"scenes"}
    code, _, err = accel(capsys, "evaluate", "run", tmp_path / "other", "--model", folder, "-c", "steps=2")
    assert code == 2
    assert "steps are for diffusion models" in err


def test_previews_are_written_on_the_way(capsys, folder, tmp_path, monkeypatch):
    """Whole files, several versions of each, the last one the image itself."""
    versions = []
    own = Path.replace

    def replace(self, to):
        versions.append(to)
        return own(self, to)

    monkeypatch.setattr(Path, "replace", replace)
    rows = generate(capsys, folder, "--out", tmp_path, "--batch", 2, "--preview")["images"]
    for row in rows:
        file = Path(row["file"])
        preview = file.with_name(f"{file.stem}-preview.png")
        assert versions.count(preview) > 2
        assert torch.equal(pixels(preview), pixels(file))
    assert not [*tmp_path.glob(".*")]


def test_previews_need_pixels_token_by_token(capsys, tmp_path):
    code, _, err = accel(capsys, "generate", "two", "--preview", "--out", tmp_path)
    assert code != 0
    assert "--preview needs an autoregressive model" in err


def test_compile_is_for_denoisers(capsys, folder, windows, tmp_path):
    out = tmp_path / "out"
    code, _, err = accel(
        capsys, "generate", "two", "--model", folder, "--config", windows, "--compile", "--out", out
    )
    assert code != 0
    assert "--compile is for denoisers" in err
    assert not out.exists()
