"""The stages: what they record, what they redo, what they refuse."""

import hashlib
import json

import numpy as np
import pytest
import torch
from fake_pipeline import SUITE, FakePipeline
from PIL import Image

from accel.evaluation import configurations, importing, suites
from accel.evaluation.errors import AccelWarning, EvaluationError, IncomparableError, RecordError
from accel.evaluation.folder import RunFolder, sample_key
from accel.evaluation.geneval import Detection, Metadata, ObjectSpec
from accel.evaluation.run import run
from accel.evaluation.score import score
from accel.evaluation.scorers import DetectionScorer, pixel_scorers

STEPS = ["steps=4", "steps=8"]


@pytest.fixture
def fake():
    return FakePipeline()


@pytest.fixture
def suite():
    return SUITE


def records(folder):
    return {sample_key(r): r for r in folder.samples()}


def scores(folder):
    return {(*sample_key(r), r["metric"]): r for r in folder.scores()}


def test_a_run_records_every_sample_with_pairs_of_one_seed(tmp_path, suite, fake):
    folder = run(tmp_path / "r", suite, fake, STEPS, samples_per_prompt=2)
    found = records(folder)
    assert len(found) == 6 * 2 * 3
    for name in ("plain", *STEPS):
        assert [found[name, 2, k]["seed"] for k in (0, 1)] == [2, 1_000_005]
    one = found["steps=4", 3, 1]
    assert one["prompt"] == "prompt 3"
    assert one["denoiser_seconds"] <= one["seconds"]
    assert one["image"] == "images/steps=4/00003/samples/0001.png"
    assert (folder.path / one["image"]).stat().st_size == one["image_bytes"]
    hashes = {r["configuration"]: r["configuration_hash"] for r in found.values()}
    assert len(set(hashes.values())) == 3
    session = next(folder.sessions())
    assert session["versions"]["torch"] == torch.__version__
    assert "git" in session


def test_configurations_alternate_and_rotate(tmp_path, suite, fake):
    folder = run(tmp_path / "r", suite, fake, STEPS, limit=3, warmup=0)
    order = [r["configuration"] for r in folder.samples()]
    assert order == ["plain", *STEPS, *STEPS, "plain", STEPS[1], "plain", STEPS[0]]


def test_the_measured_image_is_the_pipelines_own(tmp_path, suite, fake):
    folder = run(tmp_path / "r", suite, fake, [], limit=1)
    expected = fake(["prompt 0"], generator=[torch.Generator().manual_seed(0)]).images[0]
    stored = Image.open(folder.path / records(folder)["plain", 0, 0]["image"])
    assert np.array_equal(np.array(stored), np.array(expected))


def test_running_again_does_nothing_and_extending_only_what_is_missing(tmp_path, suite, fake):
    run(tmp_path / "r", suite, fake, ["steps=4"], limit=2)
    before = (tmp_path / "r/samples/rank-00000.jsonl").read_bytes()
    fake.calls.clear()
    run(tmp_path / "r", suite, fake, ["steps=4"], limit=2)
    assert fake.calls == []
    folder = run(tmp_path / "r", suite, fake, STEPS, limit=3, warmup=0)
    assert (tmp_path / "r/samples/rank-00000.jsonl").read_bytes().startswith(before)
    assert len(fake.calls) == 2 + 3  # steps=8 for the two old prompts, all three for the new one
    assert len(records(folder)) == 9


def test_a_truncated_or_lost_image_is_named_and_made_again(tmp_path, suite, fake):
    folder = run(tmp_path / "r", suite, fake, [], limit=3)
    old = records(folder)
    truncated, lost = (folder.path / old["plain", i, 0]["image"] for i in (0, 1))
    truncated.write_bytes(truncated.read_bytes()[:-10])
    lost.unlink()
    with pytest.warns(AccelWarning) as caught:
        assert len(records(folder)) == 1
    messages = " ".join(str(w.message) for w in caught)
    assert "00000/samples/0000.png: image is truncated" in messages
    assert "00001/samples/0000.png: image cannot be read" in messages
    fake.calls.clear()
    with pytest.warns(AccelWarning):
        run(tmp_path / "r", suite, fake, [], limit=3, warmup=0)
    assert len(fake.calls) == 2
    new = records(folder)
    assert {k: r["image_sha256"] for k, r in new.items()} == {k: r["image_sha256"] for k, r in old.items()}


def test_a_changed_image_of_equal_length_is_found_when_scored_and_by_verify(tmp_path, suite, fake):
    folder = run(tmp_path / "r", suite, fake, ["steps=4"], limit=2)
    file = folder.path / records(folder)["steps=4", 1, 0]["image"]
    content = file.read_bytes()
    file.write_bytes(content[:-20] + bytes(20))
    with pytest.warns(AccelWarning, match=r"00001/samples/0000.png: content differs.*--verify"):
        score(folder.path, pixel_scorers())
    assert set(scores(folder)) == {("steps=4", 0, 0, "psnr"), ("steps=4", 0, 0, "ssim")}
    run(tmp_path / "r", suite, fake, ["steps=4"], limit=2, verify=True)
    assert file.read_bytes() == content
    score(folder.path, pixel_scorers())
    assert len(scores(folder)) == 4


def test_batches_are_generated_whole_but_recorded_once(tmp_path, suite, fake):
    folder = run(tmp_path / "r", suite, fake, [], batch_size=4, warmup=0)
    assert [len(prompts) for prompts, _ in fake.calls] == [4, 2]
    (folder.path / records(folder)["plain", 2, 0]["image"]).unlink()
    fake.calls.clear()
    with pytest.warns(AccelWarning):
        run(tmp_path / "r", suite, fake, [], batch_size=4, warmup=0)
    assert [len(prompts) for prompts, _ in fake.calls] == [4]
    assert len((tmp_path / "r/samples/rank-00000.jsonl").read_text().splitlines()) == 7


def test_what_is_finished_is_not_replaced_by_an_image_of_a_larger_batch(tmp_path, suite, fake):
    """On real hardware an image differs a little with what shares its batch; its recorded hash must hold."""
    original = type(fake).__call__

    class Batched(type(fake)):
        def __call__(self, prompt, **arguments):
            result = original(self, prompt, **arguments)
            for image in result.images:
                image.putpixel((0, 0), (len(prompt), 0, 0))
            return result

    run(tmp_path / "r", suite, Batched(), [], model="m", batch_size=4, limit=2)
    folder = run(tmp_path / "r", suite, Batched(), [], model="m", batch_size=4, limit=4)
    files = {folder.path / r["image"]: r["image_sha256"] for r in records(folder).values()}
    assert [Image.open(file).getpixel((0, 0))[0] for file in files] == [2, 2, 4, 4]
    assert all(hashlib.sha256(file.read_bytes()).hexdigest() == digest for file, digest in files.items())


def test_a_start_that_made_no_image_fixes_nothing(tmp_path, suite, fake):
    """Out of memory at the first call: a smaller batch may go into the same folder."""

    class Full(type(fake)):
        def __call__(self, *args, **kwargs):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        run(tmp_path / "r", suite, Full(), ["steps=4"], model="m", batch_size=6)
    folder = run(tmp_path / "r", suite, fake, ["steps=8"], model="m", batch_size=2)
    assert list(folder.configurations) == ["plain", "steps=8"]
    assert folder.settings["batch_size"] == 2


def test_a_place_that_cannot_be_a_folder_and_lost_prompts_are_named(tmp_path, suite, fake):
    (tmp_path / "file").touch()
    with pytest.raises(RecordError, match=r"file: cannot be a run folder"):
        run(tmp_path / "file", suite, fake, [])
    folder = run(tmp_path / "r", suite, fake, [], limit=1)
    prompts = tmp_path / "r/prompts.jsonl"
    prompts.write_bytes(prompts.read_bytes()[:-12])
    with pytest.raises(RecordError, match=r"prompts\.jsonl, line 6: unreadable"):
        score(folder.path, [])
    run(tmp_path / "r", suite, fake, [], limit=1)
    score(folder.path, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_seed": 1}, "base_seed = 0, now it is 1"),
        ({"batch_size": 2}, "batch_size = 1, now it is 2"),
        ({"model": "other"}, "model = 'FakePipeline', now it is 'other'"),
        ({"configurations": ["a:steps=5"]}, "configuration 'a' was started with other settings"),
    ],
)
def test_a_folder_is_not_continued_with_other_settings(tmp_path, suite, fake, change, message):
    run(tmp_path / "r", suite, fake, ["a:steps=4"], limit=1)
    with pytest.raises(RecordError, match=message):
        run(tmp_path / "r", suite, fake, **{"configurations": [], "limit": 1, **change})


def test_other_prompts_and_foreign_folders_are_refused(tmp_path, suite, fake):
    run(tmp_path / "r", suite, fake, [], limit=1)
    other = suites.Suite("prompts", [suites.Prompt(0, "something else")])
    with pytest.raises(RecordError, match="suite"):
        run(tmp_path / "r", other, fake, [])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    with pytest.raises(RecordError, match="exists and is not a run folder"):
        run(tmp_path / "mine", suite, fake, [])
    with pytest.raises(RecordError, match="not a run folder"):
        score(tmp_path / "absent", [])


def test_an_interrupted_pipeline_keeps_what_is_finished(tmp_path, suite, fake):
    original, calls = type(fake).__call__, []

    class Interrupted(type(fake)):
        def __call__(self, *args, **kwargs):
            calls.append(1)
            if len(calls) > 4:
                raise KeyboardInterrupt
            return original(self, *args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "r", suite, Interrupted(), [], model="m", warmup=0)
    assert len(records(RunFolder(tmp_path / "r"))) == 4


def test_limit_takes_tasks_in_turn_and_a_larger_one_continues_a_smaller():
    lines = [
        Metadata(tag, (ObjectSpec("cat"),), f"{tag} {i}") for tag in ("colors", "counting") for i in range(3)
    ]
    prompts = [suites.Prompt(i, line.prompt, line) for i, line in enumerate(lines)]
    assert [p.id for p in suites.take(prompts, 3)] == [0, 3, 1]
    assert [p.id for p in suites.take(prompts, 5)] == [0, 3, 1, 4, 2]
    with pytest.raises(EvaluationError, match="at least 1"):
        suites.take(prompts, 0)


# --- score ---------------------------------------------------------------------------------------


def detect(images, metadata):
    """Sees a cat in bright pictures, and in colour red."""
    return [
        [Detection("cat", 0.9, (0, 0, 5, 5), "red")] if image.float().mean() > 110 else [] for image in images
    ]


@pytest.fixture
def geneval_run(tmp_path, fake):
    prompts = [
        suites.Prompt(
            i,
            f"a photo of a cat {i}",
            Metadata("single_object", (ObjectSpec("cat"),), f"a photo of a cat {i}"),
        )
        for i in range(8)
    ]
    return run(tmp_path / "r", suites.Suite("geneval", prompts), fake, ["steps=4"])


def test_scores_carry_values_and_reasons(geneval_run):
    score(geneval_run.path, [DetectionScorer("geneval", detect), *pixel_scorers()])
    found = scores(geneval_run)
    verdicts = [r for key, r in found.items() if key[3] == "geneval"]
    assert len(verdicts) == 16
    right = [r for r in verdicts if r["value"] == 1]
    wrong = [r for r in verdicts if r["value"] == 0]
    assert right
    assert wrong
    assert right[0]["seen"][0]["label"] == "cat"
    assert right[0]["reason"] == ""
    assert wrong[0]["reason"] == "expected at least 1 cat, found 0"
    pair = found["steps=4", 0, 0, "psnr"]
    assert pair["against"] == records(geneval_run)["plain", 0, 0]["image_sha256"]
    assert not any(key[0] == "plain" for key in found if key[3] == "psnr")


def test_scoring_again_adds_nothing_and_a_remade_image_is_scored_anew(geneval_run, fake):
    score(geneval_run.path, pixel_scorers())
    file = geneval_run.path / "scores/rank-00000.jsonl"
    before = file.read_bytes()
    score(geneval_run.path, pixel_scorers())
    assert file.read_bytes() == before
    lines = file.read_text().splitlines()
    changed = json.loads(lines[0]) | {"image_sha256": "0" * 64}
    file.write_text("\n".join([json.dumps(changed), *lines[1:]]) + "\n")
    score(geneval_run.path, pixel_scorers())
    assert len(file.read_text().splitlines()) == len(lines) + 1


def test_images_are_laid_out_as_the_official_tool_reads_them(geneval_run):
    place = geneval_run.path / "images/plain/00005"
    line = json.loads((place / "metadata.jsonl").read_text())
    assert line == {
        "tag": "single_object",
        "include": [{"class": "cat", "count": 1}],
        "prompt": "a photo of a cat 5",
    }
    assert (place / "samples/0000.png").exists()


def test_existing_folders_are_scored_in_place(tmp_path, geneval_run):
    images = geneval_run.path / "images"
    folder = importing.import_images(tmp_path / "s", {"a": images / "plain", "b": images / "steps=4"})
    score(folder.path, [DetectionScorer("geneval", detect), *pixel_scorers()])
    score(geneval_run.path, [DetectionScorer("geneval", detect), *pixel_scorers()])
    own, original = scores(folder), scores(geneval_run)
    assert own["b", 3, 0, "psnr"]["value"] == original["steps=4", 3, 0, "psnr"]["value"]
    assert own["a", 2, 0, "geneval"]["value"] == original["plain", 2, 0, "geneval"]["value"]
    importing.import_images(tmp_path / "s", {"a": images / "plain", "b": images / "steps=4"})
    assert len(list(folder.samples())) == 16


def test_flat_folders_are_paired_by_name(tmp_path, fake):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for stem in ("x", "y"):
            fake([stem], generator=[torch.Generator().manual_seed(0)]).images[0].save(
                tmp_path / name / f"{stem}.png"
            )
    folder = importing.import_images(tmp_path / "s", {"a": tmp_path / "a", "b": tmp_path / "b"})
    score(folder.path, pixel_scorers())
    assert scores(folder)["b", 0, 0, "psnr"]["reason"] == "identical"
    Image.new("RGB", (32, 32)).save(tmp_path / "b/y.png")  # made again: read anew
    with pytest.warns(AccelWarning, match=r"y\.png: .*`score --images`"):
        importing.import_images(tmp_path / "s", {"a": tmp_path / "a", "b": tmp_path / "b"})
    score(folder.path, pixel_scorers())
    assert scores(folder)["b", 1, 0, "psnr"]["value"] is not None
    with pytest.raises(RecordError, match="no such image folder"):
        importing.import_images(tmp_path / "t", {"a": tmp_path / "absent"})


def test_runs_with_prompts_of_ones_own_can_be_imported_but_not_by_many(tmp_path, suite, fake, monkeypatch):
    images = run(tmp_path / "r", suite, fake, ["steps=4"], limit=2).path / "images"  # no metadata.jsonl
    folders = {"a": images / "plain", "b": images / "steps=4"}
    folder = importing.import_images(tmp_path / "s", folders)
    assert sorted(records(folder)) == [("a", 0, 0), ("a", 1, 0), ("b", 0, 0), ("b", 1, 0)]
    assert folder.settings["suite"]["named_by_file"]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecordError, match="--images is for one process"):
        importing.import_images(tmp_path / "t", folders)


def official_row(line, boxes, correct, **changes):
    """A line as the official tool writes it: metadata and boxes as JSON in strings."""
    row = {"filename": "00000/samples/0000.png", "tag": line.tag, "prompt": line.prompt, "correct": correct}
    return {**row, "reason": "", "metadata": line.to_json(), "details": json.dumps(boxes), **changes}


def test_official_results_are_read_and_bad_lines_named(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text('{"tag": "colors", "prompt": "p", "correct": true, "reason": ""}\n')
    assert [v.correct for v in importing.official_results(file)] == [True]
    assert importing.same_rules(file)["images"] == 0  # no boxes in it
    for bad in ('{"tag": "colors"}', "[1]", '{"tag": '):
        file.write_text(bad + "\n")
        with pytest.raises(EvaluationError, match=r"results\.jsonl, line 1: not a line of GenEval's results"):
            list(importing.official_results(file))
    with pytest.raises(EvaluationError, match="cannot be read"):
        list(importing.official_results(tmp_path / "absent.jsonl"))


def test_the_official_detectors_boxes_are_judged_by_our_rules_too(tmp_path):
    one = Metadata("single_object", (ObjectSpec("cat"),), "a photo of a cat")
    red = Metadata("colors", (ObjectSpec("cat", color="red"),), "a photo of a red cat")
    seen, nothing = {"cat": [[0, 0, 5, 5, 0.9]]}, {}
    rows = [
        official_row(one, seen, True),
        official_row(one, nothing, False),
        official_row(one, nothing, True, filename="odd.png"),  # the file contradicts itself
        official_row(red, seen, False),  # what colour was seen is not in the file
    ]
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert importing.same_rules(file) == {"images": 3, "agree": 2, "differing": ["odd.png"]}
    file.write_text(json.dumps(official_row(one, {"cat": [[0, 0]]}, True)) + "\n")
    with pytest.raises(EvaluationError, match="line 1: not a line of GenEval's results"):
        importing.same_rules(file)


# --- configurations ------------------------------------------------------------------------------


def test_configuration_specs():
    parsed = configurations.parse("few:steps=8")
    assert (parsed.name, parsed.steps, parsed.method) == ("few", 8, None)
    assert configurations.parse("steps=8").name == "steps=8"
    assert configurations.parse("plain").is_plain
    assert configurations.parse("steps=8").hash == parsed.hash
    assert [c.name for c in configurations.resolve(["steps=8"])] == ["plain", "steps=8"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("steps=0", "at least 1"),
        ("steps=many", "must be an integer"),
        ("steps=8,steps=4", "given twice"),
        ("plain,ratio=0.5", "'ratio' needs a preset or file"),
        ("steps=8,fast", "'fast' is not KEY=VALUE"),
    ],
)
def test_bad_configuration_specs(spec, message):
    with pytest.raises(EvaluationError, match=message):
        configurations.parse(spec)


def test_the_same_configuration_twice_is_refused():
    with pytest.raises(EvaluationError, match="same hash"):
        configurations.resolve(["a:steps=8", "b:steps=8"])
    with pytest.raises(EvaluationError, match="same name"):
        configurations.resolve(["a:steps=8", "a:steps=4"])


def test_mixed_configurations_under_one_name_are_refused(tmp_path, suite, fake):
    from accel.evaluation.report import summarise

    folder = run(tmp_path / "r", suite, fake, ["steps=4"])
    file = tmp_path / "r/samples/rank-00000.jsonl"
    lines = file.read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | {"configuration_hash": "other"})
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(IncomparableError, match="made with 2 configurations"):
        summarise(folder)
