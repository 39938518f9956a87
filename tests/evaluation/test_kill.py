"""kill -9 at random moments: in the end the same records as without, nothing lost, nothing twice."""

import json
import multiprocessing
import os
import random
import signal
import time
import warnings

import pytest
from fake_pipeline import FakePipeline

from accel.evaluation.folder import RunFolder, sample_key
from accel.evaluation.run import run
from accel.evaluation.score import score
from accel.evaluation.scorers import PairScorer, pixel_scorers
from accel.evaluation.suites import Prompt, Suite

# What differs between two runs of the same thing.
VOLATILE = {"seconds", "denoiser_seconds", "peak_bytes", "peak_kind", "session", "time"}
KILLS = 10


def generate(path):
    suite = Suite("prompts", [Prompt(i, f"prompt {i}") for i in range(16)])
    run(path, suite, FakePipeline(), ["steps=4", "steps=8"], warmup=0, batch_size=2)


def judge(path):
    def slowly(a, b):
        time.sleep(0.02)
        return (a.float() - b.float()).abs().mean((1, 2, 3))

    score(path, [*pixel_scorers(), PairScorer("slow", slowly, higher_is_better=False)], batch_size=2)


def quietly(stage, path):
    warnings.simplefilter("ignore")  # that a record was cut off is said, and here expected
    os.environ["FAKE_STEP_SECONDS"] = "0.0005"
    stage(path)


def written(path, records):
    return sum(f.read_bytes().count(b"\n") for f in path.glob(f"{records}/*.jsonl"))


def kill_and_repeat(stage, path, records, seed):
    """Start `stage`, kill it at a random moment, ten times; then let it finish.

    The child comes from a fork server that has imported everything, so that a kill hits the work
    and not the imports. The moment is counted in records written, not in seconds: a machine twice
    as fast would else be through before the fifth kill. Returns how many kills found the process alive.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "accel.evaluation.run", "accel.evaluation.score"])
    rng = random.Random(seed)
    hit = 0
    for _ in range(KILLS):
        enough = written(path, records) + rng.randint(0, 2)
        process = context.Process(target=quietly, args=(stage, path))
        process.start()
        while process.is_alive() and written(path, records) < enough:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))  # anywhere within a record, not only at its end
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        hit += process.exitcode == -signal.SIGKILL
    process = context.Process(target=quietly, args=(stage, path))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    return hit


def stable(records):
    return sorted(
        json.dumps({k: v for k, v in r.items() if k not in VOLATILE}, sort_keys=True) for r in records
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    path = tmp_path_factory.mktemp("kill") / "whole"
    generate(path)
    judge(path)
    return RunFolder(path)


def test_run_survives_ten_kills(tmp_path, uninterrupted):
    assert kill_and_repeat(generate, tmp_path / "r", "samples", seed=1) >= 5
    folder = RunFolder(tmp_path / "r")
    assert stable(folder.samples()) == stable(uninterrupted.samples())
    lines = [line for f in (tmp_path / "r/samples").glob("*.jsonl") for line in f.read_text().splitlines()]
    keys = [sample_key(json.loads(line)) for line in lines]
    assert len(keys) == len(set(keys))
    # Temporary files of killed writers may stay, but never under a name that is read.
    assert len(list((tmp_path / "r/images").glob("*/*/samples/*.png"))) == len(keys)


def test_score_survives_ten_kills(tmp_path, uninterrupted):
    generate(tmp_path / "r")
    assert kill_and_repeat(judge, tmp_path / "r", "scores", seed=2) >= 5
    folder = RunFolder(tmp_path / "r")
    assert stable(folder.scores()) == stable(uninterrupted.scores())
    lines = (tmp_path / "r/scores/rank-00000.jsonl").read_text().splitlines()
    keys = [(*sample_key(r), r["metric"]) for r in map(json.loads, lines)]
    assert len(keys) == len(set(keys)) == 16 * 2 * 3
