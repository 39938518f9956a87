"""The command line as a user types it, on the built-in model at a size that takes seconds."""

import json
import re
import shutil
from importlib.metadata import version

import numpy as np
import pytest
import torch
from PIL import Image

from accel import backends, generation
from accel.cli import common, demo, results
from accel.cli.app import main
from accel.core import compiling
from accel.errors import ConfigError, UnsupportedError, WeightsError
from accel.methods.speculation import SpeculativeDecodingConfig
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
        recipe = json.loads(image.text["recipe"])
    assert recipe["versions"] == generation.versions()
    assert {key: recipe[key] for key in ("prompt", "seed", "steps", "guidance", "size", "configuration")} == {
        "prompt": "a photo of two rings",
        "seed": 9,
        "steps": 2,
        "guidance": 3.0,  # nobody gave it: the pipeline's own
        "size": [64, 64],
        "configuration": None,
    }


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


def test_compiled_images_are_the_same(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(compiling.OPTIONS, "backend", "eager")
    files = []
    for flags in ([], ["--compile"]):
        code, out, err = accel(
            capsys, "generate", "a photo of a star", "--steps", 8, "--size", 64, "--preset", "merging", *flags,
            "--num", 2, "--out", tmp_path / str(len(flags)), "--json",
        )  # fmt: skip
        assert code == 0
        assert ("compiling" in err) == bool(flags)
        files += [row["file"] for row in json.loads(out)["images"]]
    for eager, compiled in zip(files[:2], files[2:], strict=True):
        assert (pixels(eager) - pixels(compiled)).abs().max() <= 1


def test_demo_writes_picture_and_table(capsys, tmp_path):
    code, out, err = accel(capsys, "demo", "--steps", 7, "--out", tmp_path, "--json")
    assert code == 0
    assert "not accelerated" not in err  # the two steps of the warm-up are nobody's business
    result = json.loads(out)
    assert len(result["images"]) == 4
    assert result == json.loads((tmp_path / "demo.json").read_text())
    assert pixels(result["picture"]).shape[0] > 4 * 256
    # A second demo takes their place, and that of nothing else.
    assert demo._is_ours(tmp_path / "side-by-side.png")
    assert demo._is_ours(tmp_path / "demo.json")


def test_demo_of_chunking_draws_what_was_computed(capsys, tmp_path):
    from PIL import Image

    code, out, err = accel(capsys, "demo", "--method", "chunking", "--steps", 3, "--out", tmp_path, "--json")
    assert code == 0, err
    assert json.loads(out)["boundary_maps"] == str(tmp_path / "boundary-maps.png")
    with Image.open(tmp_path / "boundary-maps.png") as sheet:
        assert sheet.width == 12 + 2 * (256 + 12)  # two steps on fewer tokens
        shades = {color for _, color in sheet.convert("L").crop((12, 80, 268, 300)).getcolors(1000)}
    assert {255, 153} <= shades  # tokens of their own, windows of four
    code, _, err = accel(capsys, "demo", "--method", "chunking", "--preset", "fast")
    assert code == 2
    assert "give one" in err


def test_demo_of_chunking_without_a_reduced_step_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "PROMPTS", demo.PROMPTS[:1])
    code, out, err = accel(capsys, "demo", "--method", "chunking", "--steps", 1, "--out", tmp_path, "--json")
    assert code == 0, err
    assert "no step was on fewer tokens" in err
    assert "boundary_maps" not in json.loads(out)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["demo.json", "side-by-side.png"]


@pytest.mark.parametrize("name", ["side-by-side.png", "demo.json", "boundary-maps.png"])
def test_demo_keeps_files_of_other_makers(capsys, tmp_path, name):
    own = tmp_path / name
    own.write_text('{"mine": 1}')
    code, _, err = accel(capsys, "demo", "--out", tmp_path)
    assert code == 2
    assert re.search(rf"{re.escape(name)} would be overwritten; add --force", err)
    assert own.read_text() == '{"mine": 1}'


def test_one_line_a_row_and_whole_headers_at_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    common = {
        "seed": 0,
        "plain_seconds": 12.34,
        "accelerated_seconds": 6.17,
        "speedup": 2.0,
        "identical": False,
    }
    diffusion = {"denoiser_speedup": 2.1, "psnr": 47.4, "ssim": 0.99, "tokens_computed": 0.5}
    tokens = {
        "plain_forwards": 256,
        "forwards": 69,
        "tokens_per_forward": 3.7,
        "tv_per_token": 0.02,
        "window": 16,
    }
    for facts, headers in (
        (diffusion, "plain accel speedup PSNR tokens"),
        (tokens, "plain accel speedup forwards TV"),
    ):
        rows = [{"prompt": prompt, **common, **facts} for prompt in (*demo.PROMPTS, "[/x]\x1b[31m" * 20)]
        summary = results.summarise(rows, "fast", SpeculativeDecodingConfig())
        results.show({"images": rows, "summary": summary, "picture": "a.png"}, False, "title")
        out = capsys.readouterr().out
        table = out.splitlines()[1 : 2 + len(rows) + 1]
        assert table[0].split() == ["prompt", *headers.split()]
        assert all(len(line) <= 80 for line in table)
        assert [line.split()[0] for line in table[1:-1]] == ["a", "three", "a", "a", table[5].split()[0]]
        assert table[5].startswith(r"[/x]\x1b[31m[/x]")
        assert "\x1b" not in out
        for header in headers.split():
            assert out.count(f"\n{header}: ") == 1  # each number explained once


def test_json_has_a_word_for_every_number(capsys):
    row = {"prompt": "x", "seed": 0, "plain_seconds": 1.0, "accelerated_seconds": 1.0, "speedup": 1.0}
    row |= {
        "denoiser_speedup": None,
        "identical": True,
        "psnr": float("inf"),
        "ssim": 1.0,
        "tokens_computed": 1.0,
    }
    summary = results.summarise([row], "fast", None)
    results.show({"images": [row], "summary": summary}, True, "title")
    found = json.loads(
        capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
    )
    assert found["images"][0]["psnr"] is None
    assert found["images"][0]["identical"] is True
    assert found["images"][0]["ssim"] == 1.0


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
        (["--steps", "1000000000"], "at most 10000"),
        (["--guidance", "nan"], "a number from 0"),
        (["--device", "meta"], "not one of cpu"),
        (["--compare"], "--preset or --config"),
        (["--dtype", "int8"], "bfloat16"),
        (["--device", "cuda:99"], "cpu always works"),
        (["--model", "./no-such-folder"], "no such folder"),
    ],
)
def test_bad_arguments_are_named_before_any_work(capsys, tmp_path, arguments, message):
    code, _, err = accel(capsys, "generate", "a photo of a star", *arguments, "--out", tmp_path)
    assert code == 2
    assert re.search(message, err), err
    assert not list(tmp_path.iterdir())


def test_two_models_and_two_presets_want_two_names(capsys, tmp_path):
    """The README's commands, in its order, into one folder: what would be made, without making it."""
    job = generation.Job("a photo of three stars", 0)
    ways = [
        ("builtin", "balanced"),
        ("builtin-ar", "lossless"),
        ("owner/FLUX.1-dev", "balanced"),
        ("builtin", "plain"),
    ]
    names = [common.file_name(0, job, *way) for way in ways]
    assert len(set(names)) == len(names)
    assert names[2] == "0000-a-photo-of-three-stars-0-flux-1-dev-balanced.png"


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


def test_out_that_cannot_be_a_folder(capsys, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    code, _, err = accel(capsys, "generate", "a photo of a star", *SMALL, "--out", blocked / "images")
    assert code == 2
    assert f"{blocked} is a file" in err
    monkeypatch.setattr("os.access", lambda *args: False)
    code, _, err = accel(capsys, "generate", "a photo of a star", *SMALL, "--out", tmp_path / "images")
    assert code == 2
    assert f"{tmp_path} is not writable" in err
    assert not (tmp_path / "images").exists()


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
