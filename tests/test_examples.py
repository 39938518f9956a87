"""The examples run as their docstrings say."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_janus

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script, *args, cwd):
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *args], cwd=cwd, check=True, capture_output=True, text=True
    )


def test_generate_from_script(tmp_path):
    out = run("generate_from_script.py", "--num", "2", "--steps", "8", "--out", str(tmp_path), cwd=tmp_path)
    assert "PSNR" in out.stdout
    assert (tmp_path / "batch-0.png").is_file()


def test_quality_vs_speed_with_a_pipeline_and_prompts_of_ones_own(tmp_path):
    """Two starts: the second finds everything done."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    own = Path(__file__).parent / "evaluation" / "fake_pipeline.py"
    arguments = ["--model", f"{own}:make", "--prompts", "prompts.txt", "--out", "out", "--ratios"]
    for counted in ("6/6 images", ""):
        out = run("quality_vs_speed.py", *arguments, cwd=tmp_path).stdout
        assert counted in out
        assert "| steps=12 | " in out.replace("\\", "")
        assert "| steps=8 | " in out.replace("\\", "")  # 0.4 of the pipeline's 20
    assert "images" not in out.splitlines()[0]
    assert (tmp_path / "out/report/index.html").is_file()


def test_sweep_policies(tmp_path):
    """Two starts: the second reads what the first has measured, and measures what is new."""
    forecast = "{method: forecast, cycle: [0, 1], dense_steps_last: 0, dense_steps_first: %d}"
    arguments = ["sweep.jsonl", "--policies", "mine.yaml", "--steps", "4", "--limit", "2", "--size", "64"]
    for policies in ({"two": 2}, {"two": 2, "three": 3}):
        lines = [f"{name}: {forecast % dense}" for name, dense in policies.items()]
        (tmp_path / "mine.yaml").write_text("\n".join(lines))
        out = run("sweep_policies.py", *arguments, cwd=tmp_path).stdout
        assert " | two | 3.00 | 1.33x | " in out
    assert out.startswith("three: cost 3.00")
    assert len((tmp_path / "sweep.jsonl").read_text().splitlines()) == 2


def test_the_calibrator_for_cache_dit(tmp_path):
    """The same computed steps: the forecast is closer than cache-dit's own, and the correction closer still."""
    pytest.importorskip("cache_dit")
    prompts = ["a photo of three stars", "a photo of a red circle left of a blue square"]
    out = run("cache_dit_calibrator.py", "--size", "64", "--prompt", *prompts, cwd=tmp_path).stdout
    lines = [line for line in out.splitlines() if "10 of 24 steps computed" in line]
    decibels = [float(line.split(": ")[1].split(" dB")[0]) for line in lines]
    assert len(decibels) == 3
    assert decibels[0] + 1 < decibels[1]
    assert decibels[1] + 1 < decibels[2]


@pytest.mark.slow
def test_quality_vs_speed_on_the_built_in_model(tmp_path):
    out = run("quality_vs_speed.py", "--limit", "2", "--ratios", "0.5", "--steps", "2", cwd=tmp_path).stdout
    assert "| merge-0.5 | " in out
    assert "ceiling: ground-truth pictures" in out


@pytest.mark.slow
def test_training_the_extractor_writes_weights_that_load(tmp_path):
    from accel.evaluation import extractors

    file = tmp_path / "w.safetensors"
    run("train_scenes_extractor.py", "--images", "192", "--out", str(file), cwd=tmp_path)
    assert extractors.load(f"scenes:{file}").name.startswith("scenes:w.safetensors@")
    assert "100% of the objects circles" in file.with_suffix(".json").read_text()


@pytest.mark.slow
def test_wrap_your_pipeline(tmp_path):
    out = run("wrap_your_pipeline.py", cwd=tmp_path)
    assert "forecast: 1 run" in out.stdout
    assert (tmp_path / "accelerated.png").read_bytes() != (tmp_path / "plain.png").read_bytes()


@pytest.mark.slow
def test_training_writes_a_pipeline_that_loads(tmp_path):
    """A few steps of every stage, then a second start that finds everything done."""
    arguments = ["--out", str(tmp_path), "--plan", "64:128", "--vae-samples", "64", "--text-steps", "3"]
    run("train_scenes_diffusion.py", *arguments, cwd=tmp_path)
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(tmp_path / "pipeline")
    image = pipe(
        "a photo of a star", height=64, width=64, num_inference_steps=1, max_sequence_length=16
    ).images
    assert image[0].size == (64, 64)
    assert "resumed" in run("train_scenes_diffusion.py", *arguments, cwd=tmp_path).stdout


@pytest.mark.slow
def test_pruning_overhead(tmp_path):
    out = run("pruning_overhead.py", "--rounds", "1", "--steps", "2", cwd=tmp_path).stdout
    assert "multiply-accumulates: 0.312 of a plain step" in out
    assert "time / (budget x plain): " in out
    assert "operators per step: " in out


def test_speculative_decoding(tmp_path):
    folder = tiny_janus.save(tmp_path / "janus", tiny_janus.model(context=256))
    arguments = ["--model", str(folder), "--prompt", "two", "--num", "2", "--out", "runs.png"]
    (tmp_path / "windows.yaml").write_text("method: speculative_decoding\nwindow: 4\nauto_disable: false\n")
    out = run("speculative_decoding.py", *arguments, "--preset", "windows.yaml", cwd=tmp_path)
    assert "speculative_decoding: 2 images" in out.stdout
    assert "2 of 2 images are plain decoding's" in out.stdout
    assert (tmp_path / "runs.png").is_file()
