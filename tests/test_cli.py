"""The command line as a user types it, on the built-in model at a size that takes seconds."""

import json
import shutil
from importlib.metadata import version

import numpy as np
import pytest
import torch
from PIL import Image

from accel import backends, generation
from accel.cli.app import main
from accel.errors import ConfigError, UnsupportedError, WeightsError
from accel.pipelines.builtin import FOLDER

SMALL = ["--steps", "2", "--size", "64"]


def pixels(path):
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image)).int()


def accel(capsys, *args):
    """Runs `accel ARGS…`; returns (exit code, stdout, stderr)."""
    with pytest.raises(SystemExit) as left:
        main(map(str, args))
    code = left.value.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_generate_saves_images_with_their_recipe(capsys, tmp_path):
    code, out, _ = accel(
        capsys, "generate", "a photo of a star", "a photo of two rings", *SMALL, "--num", 2, "--batch", 3,
        "--seed", 7, "--out", tmp_path, "--json",
    )  # fmt: skip
    assert code == 0
    rows = json.loads(out)["images"]
    assert [row["seed"] for row in rows] == [7, 8, 9, 10]
    with Image.open(rows[2]["file"]) as image:
        assert image.size == (64, 64)
        assert image.text["prompt"] == "a photo of two rings"
        assert image.text["seed"] == "9"
        assert image.text["accel"] == "plain"


def test_an_image_depends_on_its_seed_and_not_on_its_batch(capsys, tmp_path):
    for batch in (1, 3):
        folder = tmp_path / str(batch)
        accel(capsys, "generate", "a photo of a star", *SMALL, "--num", 3, "--batch", batch, "--out", folder)
    for one, three in zip(
        sorted((tmp_path / "1").iterdir()), sorted((tmp_path / "3").iterdir()), strict=True
    ):
        a, b = pixels(one), pixels(three)
        assert (a - b).abs().max() <= 1  # batched matmuls may round differently
    images = [path.read_bytes() for path in sorted((tmp_path / "1").iterdir())]
    assert len(set(images)) == 3


def test_compare_writes_both_and_the_difference(capsys, tmp_path):
    code, out, _ = accel(
        capsys, "generate", "a photo of a heart", "--steps", 8, "--size", 64, "--preset", "balanced",
        "--compare", "--out", tmp_path, "--json",
    )  # fmt: skip
    assert code == 0
    result = json.loads(out)
    row = result["images"][0]
    assert 0 < row["tokens_computed"] < 1
    assert 5 < row["psnr"] < 100
    assert row["speedup"] == pytest.approx(row["plain_seconds"] / row["accelerated_seconds"])
    (sheet,) = tmp_path.glob("*-compare.png")
    assert pixels(sheet).shape[1] > 2 * 64


def test_demo_writes_picture_and_table(capsys, tmp_path):
    code, out, err = accel(capsys, "demo", "--steps", 7, "--out", tmp_path, "--json")
    assert code == 0
    assert "not accelerated" not in err  # the two steps of the warm-up are nobody's business
    result = json.loads(out)
    assert len(result["images"]) == 4
    assert result == json.loads((tmp_path / "demo.json").read_text())
    assert pixels(result["picture"]).shape[0] > 4 * 256
    code, _, err = accel(capsys, "demo", "--steps", 4, "--out", tmp_path)
    assert code == 2
    assert "--force" in err


def test_info_names_what_is_active_and_why_the_rest_is_not(capsys):
    code, out, _ = accel(capsys, "info", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["versions"]["torch"] == version("torch")
    assert {"cuda", "triton", "torchvision", "xformers"} <= set(report["backends"])
    inactive = [probe for probe in report["backends"].values() if not probe["active"]]
    assert all(probe["detail"] for probe in inactive)
    assert "balanced" in report["presets"]
    assert accel(capsys, "info")[1].count("\n") > 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "balancd"], "balanced"),
        (["--size", "100"], "96x96|104x104"),
        (["--size", "tall"], "WIDTHxHEIGHT"),
        (["--steps", "0"], "at least 1"),
        (["--compare"], "--preset or --config"),
        (["--dtype", "int8"], "bfloat16"),
        (["--device", "cuda:99"], "cpu always works"),
        (["--model", "./no-such-folder"], "no such folder"),
    ],
)
def test_bad_arguments_are_named_before_any_work(capsys, tmp_path, arguments, message):
    import re

    code, _, err = accel(capsys, "generate", "a photo of a star", *arguments, "--out", tmp_path)
    assert code == 2
    assert re.search(message, err), err
    assert not list(tmp_path.iterdir())


def test_yaml_with_an_unknown_key_lists_the_valid_ones(capsys, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("method: token_merging\nratoi: 0.5\n")
    code, _, err = accel(
        capsys, "generate", "a photo of a star", "--config", config, "--out", tmp_path / "out"
    )
    assert code == 2
    assert "ratoi" in err
    assert "ratio" in err.replace("ratoi", "")


def test_nothing_is_overwritten_without_force(capsys, tmp_path):
    arguments = ["generate", "a photo of a star", *SMALL, "--out", tmp_path]
    assert accel(capsys, *arguments)[0] == 0
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()
    code, _, err = accel(capsys, *arguments, "--steps", 3)
    assert code == 2
    assert file.name in err.replace("\n", "")
    assert file.read_bytes() == before
    assert accel(capsys, *arguments, "--steps", 3, "--force")[0] == 0
    assert file.read_bytes() != before


def test_out_that_cannot_be_a_folder(capsys, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    code, _, err = accel(capsys, "generate", "a photo of a star", *SMALL, "--out", blocked / "images")
    assert code == 2
    assert "cannot be created" in err


def test_ctrl_c_keeps_the_finished_images(capsys, tmp_path, monkeypatch):
    real, calls = generation.run, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(generation, "run", interrupted)
    code, _, err = accel(capsys, "generate", "a photo of a star", *SMALL, "--num", 4, "--out", tmp_path)
    assert code == 130
    assert "2 of 4" in err
    assert [pixels(path).shape for path in sorted(tmp_path.iterdir())] == [(64, 64, 3)] * 2


def test_unknown_words_are_named(recwarn):
    pipe = generation.load_pipeline()
    with pytest.warns(UserWarning, match="dog, sofa"):
        pipe("a photo of a dog and a sofa", num_inference_steps=1, height=64, width=64)


def test_initial_noise_is_the_same_with_and_without(monkeypatch):
    """The denoiser's very first input, bit for bit; after the first reduced step the two may part."""
    from accel import TokenMergingConfig, accelerate

    pipe = generation.load_pipeline()
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].clone()), with_kwargs=True
    )
    jobs, settings = [generation.Job("a photo of a star", 3)], generation.Settings(4, (64, 64))
    generation.run(pipe, jobs, settings)
    plain = seen[0]
    seen.clear()
    with accelerate(pipe, TokenMergingConfig(ratio=0.5)):
        generation.run(pipe, jobs, settings)
    hook.remove()
    assert torch.equal(plain, seen[0])


@pytest.fixture
def copied_model(tmp_path):
    return shutil.copytree(FOLDER, tmp_path / "model")


def test_broken_weights_are_named(copied_model, monkeypatch):
    from accel.pipelines import builtin

    monkeypatch.setattr(builtin, "FOLDER", copied_model)
    weights = copied_model / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"vae.*corrupt"):
        generation.load_pipeline()
    weights.unlink()
    with pytest.raises(WeightsError, match=r"vae.*missing"):
        generation.load_pipeline()


def test_pickled_weights_are_refused(copied_model):
    for path in list(copied_model.rglob("*.safetensors")):
        path.rename(path.with_suffix(".bin"))
    with pytest.raises(WeightsError, match=r"pickles.*refused"):
        generation.load_pipeline(str(copied_model))


def test_the_built_in_folder_is_a_plain_flux_pipeline(copied_model):
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(copied_model)
    assert pipe.transformer.config.in_channels == 16
    assert generation.load_pipeline(str(copied_model)).__class__ is FluxPipeline


def test_a_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(WeightsError, match=r"model_index\.json"):
        generation.load_pipeline(str(tmp_path))


def test_broken_torchvision_is_named(monkeypatch):
    monkeypatch.setattr(backends, "_version", lambda package: "0.0.1")
    monkeypatch.setattr(
        backends, "_import", lambda module: "RuntimeError: operator torchvision::nms does not exist"
    )
    with pytest.raises(UnsupportedError, match=r"torchvision 0\.0\.1 does not work with torch"):
        generation.load_pipeline()


def test_size_must_fit_the_model():
    pipe = generation.load_pipeline()
    with pytest.raises(ConfigError, match="divisible by 8"):
        generation.Settings(size=(250, 256)).check(pipe)
