"""Several processes under `accelerate launch`: the same records as one, and a dead rank resumed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_pipeline import SUITE, FakePipeline

from accel.evaluation.folder import RunFolder, sample_key
from accel.evaluation.run import run
from accel.evaluation.score import score
from accel.evaluation.scorers import pixel_scorers
from accel.evaluation.suites import load

HERE = Path(__file__).parent
ACCELERATE, ACCEL = (
    shutil.which(name, path=str(Path(sys.executable).parent)) for name in ("accelerate", "accel")
)
VOLATILE = {"seconds", "denoiser_seconds", "peak_bytes", "peak_kind", "session", "time"}


def launch(*arguments, processes=2):
    command = [ACCELERATE, "launch", "--multi_gpu", "--num_processes", str(processes), "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["--no_python", ACCEL, "evaluate", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)


def stable(records):
    return sorted(
        json.dumps({k: v for k, v in r.items() if k not in VOLATILE}, sort_keys=True) for r in records
    )


@pytest.mark.skipif(not (ACCELERATE and ACCEL), reason="the commands accelerate and accel are not installed")
def test_two_processes_give_the_records_of_one(tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"prompt {i}\n" for i in range(7)))
    model = f"{HERE / 'fake_pipeline.py'}:make"
    arguments = [tmp_path / "two", "--suite", prompts, "--model", model, "-c", "steps=4", "--device", "cpu"]
    finished = launch("run", *arguments)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":  # the launcher itself has been shown above, and takes its time to start
        monkeypatch.setenv("RANK", rank)
        score(tmp_path / "two", pixel_scorers(), batch_size=2)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")

    one = run(tmp_path / "one", load(str(prompts)), FakePipeline(), ["steps=4"], model=model)
    score(one.path, pixel_scorers())
    two = RunFolder(tmp_path / "two")
    files = sorted(file.name for file in (two.path / "samples").iterdir())
    assert files == ["rank-00000.jsonl", "rank-00001.jsonl"]
    assert all(file.stat().st_size for file in (two.path / "scores").glob("rank-*.jsonl"))
    assert stable(two.samples()) == stable(one.samples())
    assert stable(two.scores()) == stable(one.scores())


def test_ranks_share_the_work_and_a_dead_one_is_resumed(tmp_path, monkeypatch):
    fake = FakePipeline()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    folder = run(tmp_path / "r", SUITE, fake, ["steps=4"])
    assert {key[1] for key in map(sample_key, folder.samples())} == {1, 3, 5}
    # Rank 0 died before its first image; later everything is started again, in one process.
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    fake.calls.clear()
    run(tmp_path / "r", SUITE, fake, ["steps=4"], warmup=0)
    assert len(fake.calls) == 6
    assert len(list(folder.samples())) == 12
