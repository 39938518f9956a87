"""The distilling trainer: where its teacher goes, whose states it trains on, and that a run stops, saves and goes on."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from accel.core import sidecar
from accel.pipelines import builtin

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def trainer():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import distill_few_steps

        return distill_few_steps
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def model(trainer):
    return trainer.Model([trainer.WORLD], 64, torch.device("cpu"))


def test_the_teacher_is_guided(trainer, model):
    """Two of the conditional branch against one of the other: 1 + 3 (2 - 1)."""
    walks = trainer.Walks(model, [4], 2, 0)
    walks.model = SimpleNamespace(
        predict=lambda weights, x, *rest: torch.cat([torch.full_like(x[:2], 2.0), torch.ones_like(x[2:])])
    )
    way = walks._teacher({}, torch.zeros(2, 3, 1), (0.9, 0.8, 0.5), ())
    assert torch.allclose(way, torch.full_like(way, 4.0))


def test_the_teacher_follows_the_flow_better_than_its_student_step_and_than_euler(trainer, model):
    """dx/ds = x has the solution exp: the average velocity from s to s' is (exp(s' - s) - 1) / (s' - s) times x."""
    walks = trainer.Walks(model, [4], 2, 0)
    walks.model = SimpleNamespace(predict=lambda weights, x, *rest: x)
    x = torch.ones(2, 3, 1)
    first, middle, last = 0.9, 0.65, 0.3
    exact = (math.exp(last - first) - 1) / (last - first)
    halves = 1 + (middle - first)
    euler = (halves * (1 + last - middle) - 1) / (last - first)
    error = (walks._teacher({}, x, (first, middle, last), ()) - exact).abs().max().item()
    assert error < 0.4 * abs(euler - exact)
    assert error < 0.2 * abs(1 - exact)


def test_a_walk_goes_the_teachers_way_or_the_students_and_always_asks_the_teacher(trainer, model):
    base = model.bases[trainer.WORLD]
    low = trainer.LowRank(model.net, trainer.rank_of)
    for tensor in low.parameters():
        tensor.data += 0.03 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        changed = low.changed(base)
    sigmas = model.sigmas(4)
    for weights in (None, changed):
        walks = trainer.Walks(model, [4], 1, 0)
        assert walks.add(weights) == 4
        states, times, ways, tokens, pooled = walks.kept[0]
        assert torch.allclose(times, torch.tensor(sigmas[:4]))
        fine = model.sigmas(8)
        features = [
            torch.cat([feature[:1], empty])
            for feature, empty in zip((tokens, pooled), empty_text(model), strict=True)
        ]
        asked = walks._teacher(base, states[2:3], tuple(fine[4:7]), features)
        assert torch.allclose(asked, ways[2:3], atol=1e-4)
        own = ways[1:2]
        if weights is not None:
            with torch.no_grad():
                own = model.predict(weights, states[1:2], times[1], tokens[1:2], pooled[1:2])
            assert not torch.allclose(own, ways[1:2], atol=0.05)
        assert torch.allclose(states[2:3], states[1:2] + (sigmas[2] - sigmas[1]) * own, atol=1e-4)


def empty_text(model):
    from scenes_text import encode

    pipe = model.pipes["flat"]
    with torch.no_grad():
        return encode(pipe.text_encoder, pipe.text_encoder_2, pipe.tokenizer, pipe.tokenizer_2, [""], "cpu")


def test_it_learns_stops_in_time_and_goes_on(trainer, tmp_path, monkeypatch, capsys):
    options = ["--sizes", "64", "--shares", "1", "--batches", "2", "--report", "0", "--float32", "--seconds"]
    for seconds, said in (("1", "step 12, teacher's states: loss"), ("4", "resumed at step 12")):
        monkeypatch.setattr(sys, "argv", ["distill_few_steps.py", "--out", str(tmp_path), *options, seconds])
        trainer.main()
        assert said in capsys.readouterr().out
    file = tmp_path / "turbo.safetensors"
    assert file.stat().st_size < 4_000_000
    assert not list(tmp_path.glob("*.part"))
    car = sidecar.read(file, trainer.KIND)
    car.check(builtin.load_pipeline("cpu").transformer)
    assert sum(b.abs().max() > 0 for _, b in car.layers.values()) > 0.9 * len(car.layers)
    # One run's side-car is another one's start.
    out = tmp_path / "eight"
    arguments = ["--out", str(out), "--start", str(file), "--steps", "8", *options, "0"]
    monkeypatch.setattr(sys, "argv", ["distill_few_steps.py", *arguments])
    trainer.main()
    again = sidecar.read(out / "turbo.safetensors", trainer.KIND)
    assert all(torch.equal(again.layers[path][1], b) for path, (_, b) in car.layers.items())
