"""What stops a run, and what does not: configurations that fail, folders that are only looked at."""

import pytest
from fake_pipeline import SUITE, FakePipeline

from accel.evaluation.errors import RecordError
from accel.evaluation.folder import sample_key
from accel.evaluation.run import check, run

STEPS = ["steps=4", "steps=8"]


def test_a_configuration_that_fails_stops_the_run_or_is_given_up(tmp_path):
    original, asked = FakePipeline.__call__, []

    class Fails(FakePipeline):
        def __call__(self, prompt, *, num_inference_steps=20, **arguments):
            if (prompt, num_inference_steps) == (["prompt 2"], 4):
                raise RuntimeError("no such shape")
            return original(self, prompt, num_inference_steps=num_inference_steps, **arguments)

    with pytest.raises(RuntimeError, match="no such shape"):
        run(tmp_path / "loud", SUITE, Fails(), STEPS, warmup=0)
    with pytest.raises(RuntimeError, match="no such shape"):
        run(tmp_path / "asked", SUITE, Fails(), STEPS, warmup=0, tolerate=lambda *_: False)

    def tolerate(configuration, prompts, error):
        asked.append((configuration.name, [p.text for p in prompts], str(error)))
        return True

    seen = []
    folder = run(tmp_path / "r", SUITE, Fails(), STEPS, warmup=0, tolerate=tolerate, progress=seen.append)
    assert asked == [("steps=4", ["prompt 2"], "no such shape")]  # once: it is left alone from there on
    made = [sample_key(record)[:2] for record in folder.samples()]
    assert sorted(i for name, i in made if name == "steps=4") == [0, 1]
    assert all(sorted(i for n, i in made if n == name) == list(range(6)) for name in ("plain", "steps=8"))
    assert seen[-1][:2] == (18, 18)


def test_checking_a_folder_writes_nothing(tmp_path):
    folder, settings, resolved = check(tmp_path / "r", SUITE, FakePipeline(), STEPS, limit=1)
    assert list(folder.path.iterdir()) == []
    assert (settings["limit"], [c.name for c in resolved]) == (1, ["plain", *STEPS])
    run(tmp_path / "r", SUITE, FakePipeline(), [], limit=1)
    with pytest.raises(RecordError, match="base_seed = 0, now it is 1"):
        check(tmp_path / "r", SUITE, FakePipeline(), [], limit=1, base_seed=1)
