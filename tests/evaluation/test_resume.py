"""A run that goes on: everything that decides an image is compared, nobody touches a running run, it ends."""

import json
import os

import diffusers
import pytest
import torch
from fake_pipeline import SUITE, FakePipeline

from accel.evaluation import environment as environments
from accel.evaluation import run as runs
from accel.evaluation.errors import AccelWarning, EvaluationError, RecordError
from accel.evaluation.folder import RunFolder, sample_key
from accel.evaluation.identity import _numpy_sum, _torch_sum, identity, modules, weights_hash
from accel.evaluation.records import Appender, LaunchLock, latest_records
from accel.evaluation.report import report, summarise
from accel.evaluation.report.tables import facts
from accel.evaluation.run import run


class Weighted(FakePipeline):
    """With weights, a scheduler and a dtype, as real pipelines have them."""

    def __init__(self, seed=0, shift=1.0, dtype=torch.float32, device="cpu"):
        super().__init__()
        torch.manual_seed(seed)
        self.text_encoder = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.BatchNorm1d(512)).to(dtype)
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        self.dtype, self.device = dtype, torch.device(device)


def start(tmp_path, pipe, limit=1, **options):
    return run(tmp_path / "r", SUITE, pipe, [], limit=limit, warmup=0, **options)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"seed": 1}, r"model_weights = '[0-9a-f]{16}', now it is '[0-9a-f]{16}'"),
        ({"shift": 3.0}, r"scheduler\.shift = 1\.0, now it is 3\.0"),
        ({"dtype": torch.bfloat16}, r"dtype = 'float32', now it is 'bfloat16'"),
        ({"device": "mps"}, r"device = 'cpu', now it is 'mps'"),
    ],
)
def test_another_model_under_the_same_name_is_refused_by_what_differs(tmp_path, monkeypatch, changed, says):
    start(tmp_path, Weighted())
    before = (tmp_path / "r/run.json").read_bytes()
    assert len(list(start(tmp_path, Weighted(), limit=2).samples())) == 2  # the same again goes on
    with pytest.raises(RecordError, match=says) as caught:
        start(tmp_path, Weighted(**changed), limit=3)
    assert "\n" not in str(caught.value)
    assert json.loads((tmp_path / "r/run.json").read_text()) == json.loads(before) | {"limit": 2}
    assert facts(summarise(RunFolder(tmp_path / "r")))[6][0] == "scheduler"


@pytest.mark.parametrize("call", [{"guidance_scale": 3.0}, {"height": 64}, {"num_inference_steps": 3}])
def test_arguments_of_the_call_are_named_with_both_values(tmp_path, call):
    class Takes(FakePipeline):
        def __call__(self, prompt, *, guidance_scale=1.0, height=32, **arguments):
            return super().__call__(prompt, **arguments)

    start(tmp_path, Takes())
    ((name, value),) = call.items()
    with pytest.raises(RecordError, match=rf"call\.{name} = None, now it is {value}"):
        start(tmp_path, Takes(), call=call)


def test_the_hash_is_of_content(tmp_path):
    model = Weighted().text_encoder
    first = weights_hash({"text_encoder": model})
    assert first == weights_hash({"text_encoder": Weighted().text_encoder})
    assert first == weights_hash({"text_encoder": torch.compile(Weighted().text_encoder)})
    with torch.no_grad():
        for name, tensor in model.state_dict().items():  # every one of them counts, buffers too
            if tensor.is_floating_point():
                before = tensor.clone()
                tensor.view(-1)[-1] += 1
                assert weights_hash({"text_encoder": model}) != first, name
                tensor.copy_(before)
    assert weights_hash({"text_encoder": model}) == first
    assert weights_hash({"other": Weighted().text_encoder}) != first
    assert weights_hash({"text_encoder": Weighted(dtype=torch.float16).text_encoder}) != first
    assert weights_hash({}) is None


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.bool]
)
def test_one_element_of_a_large_tensor_counts_and_so_does_its_place(dtype):
    """A buffer of a million elements, of which 64 KiB are looked at one by one."""
    module = torch.nn.Module()
    values = torch.zeros(1_000_003)
    values[:1000] = 1
    found = []
    for place in (None, 777_777, 999_999):
        changed = values.clone()
        if place is not None:
            changed[place] = 1
        module.register_buffer("b", changed.to(dtype))
        found.append(weights_hash({"m": module}))
    assert found[0] not in found[1:]
    module.register_buffer("b", values.flip(0).to(dtype))
    assert weights_hash({"m": module}) not in found
    module.register_buffer("b", values.to(dtype).to("meta"))
    assert weights_hash({"m": module}) not in (None, *found)


@pytest.mark.parametrize("offset", [0, 3, 8])
def test_the_sum_is_the_same_on_every_device(offset):
    content = torch.randint(
        0, 256, (8 * 1000 + offset,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    words = content[offset:]
    expected = sum(int.from_bytes(bytes(words[i : i + 8].tolist()), "little") for i in range(0, 8000, 8))
    assert _numpy_sum(words) == _torch_sum(words) == expected % (1 << 64)


def test_the_builtin_pipelines_show_what_they_are():
    from accel.generation import load_pipeline

    flux = load_pipeline("builtin", "cpu")
    assert {"transformer", "vae", "text_encoder", "text_encoder_2"} <= modules(flux).keys()
    found = identity(flux)
    assert found == identity(load_pipeline("builtin", "cpu"))
    assert (found["dtype"], found["device"]) == ("float32", "cpu")
    assert found["scheduler"]["class"] == type(flux.scheduler).__name__
    wrapped = FakePipeline()
    wrapped.inner = flux
    assert {"inner.transformer", "inner.vae"} <= modules(wrapped).keys()
    flux.scheduler = None
    flux.decoder_scheduler = diffusers.DDIMScheduler()  # Karlo's name for it
    assert identity(flux)["scheduler"]["class"] == "DDIMScheduler"
    drawn = load_pipeline("builtin-ar", "cpu")
    assert modules(drawn)
    assert identity(drawn)["model_weights"] not in (None, found["model_weights"])


def test_other_versions_are_said_and_go_on(tmp_path, monkeypatch):
    start(tmp_path, FakePipeline())
    known = environments.environment()
    later = known | {"versions": known["versions"] | {"torch": "99.1", "numpy": "9"}, "device": "GPU 2"}
    monkeypatch.setattr(runs, "environment", lambda: later)
    with pytest.warns(AccelWarning, match=r"torch \S+ and 99\.1; device .* and GPU 2") as w:
        folder = start(tmp_path, FakePipeline(), limit=2)
    assert "numpy" not in str(w[0].message)  # not what computes the pictures
    (note,) = [note for note in summarise(folder)["notes"] if "versions" in note]
    assert f"torch {known['versions']['torch']} and 99.1" in note
    page = report(folder.path)
    assert "99.1" in page.with_name("report.md").read_text()
    start(tmp_path, FakePipeline(), limit=2)  # nothing to do, nothing to say


def test_a_start_while_another_one_runs_touches_nothing(tmp_path):
    folder = start(tmp_path, FakePipeline())
    files = folder.path / "run.json", folder.path / "prompts.jsonl"
    before = [file.read_bytes() for file in files]
    with Appender(folder.path / "samples/rank-00000.jsonl"):
        with pytest.raises(RecordError, match="another process is writing here"):
            run(folder.path, SUITE, FakePipeline(), ["steps=4"], limit=5)
        assert [file.read_bytes() for file in files] == before
    run(folder.path, SUITE, FakePipeline(), ["steps=4"], limit=5)
    assert files[0].read_bytes() != before[0]


def test_a_start_with_another_number_of_processes_waits_its_turn(tmp_path, monkeypatch):
    """Its second process would find no lock on its own file, and write other settings into a running run."""
    folder = start(tmp_path, FakePipeline())
    before = (folder.path / "run.json").read_bytes()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with LaunchLock(folder.path / "sessions", 1):
        with pytest.raises(RecordError, match="a start with 1 process is running here, this one has 2"):
            start(tmp_path, FakePipeline(), limit=5)
        assert (folder.path / "run.json").read_bytes() == before
    with LaunchLock(folder.path / "sessions", 2):  # the other processes of its own start
        start(tmp_path, FakePipeline(), limit=5)
    assert {key[1] for key in map(sample_key, folder.samples())} == {0, 1, 3}


def test_a_start_that_was_killed_before_its_settings_can_be_repeated(tmp_path):
    Appender(tmp_path / "r/samples/rank-00000.jsonl").close()
    Appender(tmp_path / "r/sessions/rank-00000.jsonl").close()
    assert len(list(start(tmp_path, FakePipeline()).samples())) == 1
    (tmp_path / "mine/samples").mkdir(parents=True)
    (tmp_path / "mine/samples/violin.wav").touch()
    with pytest.raises(RecordError, match="exists and is not a run folder"):
        run(tmp_path / "mine", SUITE, FakePipeline(), [])


def test_a_lost_image_of_another_process_is_made_once(tmp_path, monkeypatch):
    """Process 1's record is in a later file than the new one of process 0; by the files' order it stayed the
    last word, and the image was made again at every start."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        folder = start(tmp_path, FakePipeline(), limit=4)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    lost = next(r for r in folder.samples() if r["prompt_id"] == 3)
    file = folder.path / lost["image"]
    file.write_bytes(file.read_bytes() + b"more")
    for path in (folder.path / "samples").glob(
        "rank-00001.jsonl"
    ):  # its hash, too, is no longer what is made
        path.write_text(path.read_text().replace(str(lost["image_bytes"]), str(lost["image_bytes"] + 9)))
    pipe = FakePipeline()
    with pytest.warns(AccelWarning, match="00003/samples/0000.png"):
        start(tmp_path, pipe, limit=4)
    assert len(pipe.calls) == 1
    start(tmp_path, pipe, limit=4)
    assert len(pipe.calls) == 1
    assert len(list(folder.samples())) == 4


def test_the_later_record_counts_whatever_its_file_and_whatever_the_clock(tmp_path):
    def write(name, *rows):
        (tmp_path / name).write_text(
            "".join(json.dumps({"k": k, "time": t, "v": v}) + "\n" for k, t, v in rows)
        )

    write(
        "rank-0.jsonl",
        (2, "2026-01-01T00:00:00.0+00:00", "old"),
        (1, "2026-01-02T00:00:00.5+00:00", "newest"),
    )
    # In the second file the clock was set back between its two lines.
    write(
        "rank-1.jsonl", (1, "2026-01-02T00:00:00.4+00:00", "older"), (2, "2025-01-01T00:00:00.0+00:00", "new")
    )
    latest = latest_records(tmp_path.glob("*.jsonl"), lambda r: r["k"])
    assert [(r["k"], r["v"]) for r in latest] == [(1, "newest"), (2, "new")]


def test_a_kill_between_the_two_images_of_a_pair_is_said(tmp_path):
    class Killed(FakePipeline):
        def __call__(self, prompt, **arguments):
            if len(self.calls) == 3:
                raise KeyboardInterrupt
            return super().__call__(prompt, **arguments)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "r", SUITE, Killed(), ["steps=4"], model="m", warmup=0)
    pipe = FakePipeline()
    pipe.__class__ = Killed  # the same pipeline, going on
    pipe.calls = [None] * 10
    folder = run(tmp_path / "r", SUITE, pipe, ["steps=4"], model="m", warmup=0)
    summary = summarise(folder)
    speed = next(r for r in summary["configurations"] if r["name"] == "steps=4")["speed"]["pipeline"]
    assert (speed["speedup"]["n"], speed["unpaired"]) == (5, 1)
    assert [n for n in summary["notes"] if "1 of 6 timed calls have no plain call of the same start" in n]
    whole = summarise(run(tmp_path / "whole", SUITE, FakePipeline(), ["steps=4"]))
    assert not [n for n in whole["notes"] if "timed calls" in n]


def test_seeds_that_a_generator_cannot_take_are_refused_first(tmp_path):
    for seed in (-1, 1 << 63, 10**40):
        with pytest.raises(EvaluationError, match="base_seed must be from 0 to 92233720368547758"):
            start(tmp_path, FakePipeline(), base_seed=seed)
    assert not os.path.exists(tmp_path / "r")
    start(tmp_path, FakePipeline(), base_seed=(1 << 63) - 6)
