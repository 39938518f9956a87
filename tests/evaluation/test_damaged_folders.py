"""A run folder that is damaged, or of another format, is named in one line by every stage."""

import json
import random
import re
import shutil

import pytest
import torch
from fake_pipeline import SUITE, FakePipeline

from accel.errors import AccelError
from accel.evaluation.errors import AccelWarning, RecordError
from accel.evaluation.folder import FORMAT, RunFolder
from accel.evaluation.report import report
from accel.evaluation.run import run
from accel.evaluation.score import score
from accel.evaluation.scorers import pixel_scorers

CHANGES = 30  # 500 were tried
DEEP = "[" * 3000 + "]" * 3000


class Mean:
    """A two-number extractor."""

    name, dim = "mean:test@0", 2

    def __call__(self, images):
        return torch.stack([images.float().mean((1, 2, 3)), images.float().std((1, 2, 3))], 1)


def go_on(path):
    run(path, SUITE, FakePipeline(), ["steps=4"], limit=4, warmup=0)


def judge(path):
    score(path, pixel_scorers(), [Mean()], bounds=lambda prompts: {"ceiling": None, "floor": None})


STAGES = {"run": go_on, "score": judge, "report": report}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "r"
    go_on(path)
    judge(path)
    return path


@pytest.fixture
def folder(tmp_path, whole):
    return shutil.copytree(whole, tmp_path / "r")


def refused(stage, folder, says):
    with pytest.raises(AccelError, match=says) as caught:
        STAGES[stage](folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", DEEP, '{"format": NaN}', "\0", "\xff"])
def test_settings_that_are_no_json_object(folder, stage, content):
    (folder / "run.json").write_bytes(content.encode("latin-1"))
    refused(stage, folder, r"r/run\.json: .*; restore it, or start a new folder")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("number", [FORMAT - 1, FORMAT + 1, "2", None])
def test_another_format(folder, stage, number):
    settings = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(settings | {"format": number}))
    before = (folder / "run.json").read_bytes()
    refused(
        stage,
        folder,
        rf"run\.json: a run folder of format {re.escape(repr(number))}, this accel has {FORMAT}",
    )
    # Nor is one overwritten in which this accel sees no images: another format may keep them elsewhere.
    (folder / "samples/rank-00000.jsonl").unlink()
    refused("run", folder, "a run folder of format")
    assert (folder / "run.json").read_bytes() == before


WRONG = {
    "suite": [None, 3, [], {}],
    "configurations": [None, "x", {}, [], [3], [{"name": "plain"}]],
    "model": [None, 3],
    "call": [None, [3]],
    "pipeline": [None, {}],
    "scheduler": [3],
    "model_weights": [7],
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG.items() for value in values]
)
def test_settings_of_wrong_types(folder, stage, key, value):
    settings = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(settings | {key: value}))
    refused(stage, folder, r"run\.json: damaged: ")


@pytest.mark.parametrize("stage", ["score", "report"])
@pytest.mark.parametrize(
    "content", [None, "{", "3\n", DEEP, '{"id": "0", "prompt": "x"}\n', '{"id": 0}\n', "\xff"]
)
def test_prompts_are_named_and_written_anew_by_the_next_start(folder, stage, content):
    file = folder / "prompts.jsonl"
    whole = file.read_bytes()
    file.unlink() if content is None else file.write_bytes(content.encode("latin-1"))
    refused(stage, folder, r"prompts\.jsonl.*; the command that started this folder writes the file anew")
    go_on(folder)
    assert file.read_bytes() == whole
    file.write_bytes(b"".join(whole.splitlines(keepends=True)[1:]))
    refused(stage, folder, r"prompts\.jsonl: has no prompt 0, of which there are images")


@pytest.mark.parametrize("stage", ["score", "report"])
@pytest.mark.parametrize(
    "content", ["{", "[]", DEEP, '{"ceiling": 3}', '{"floor": {"overall": {"value": 1}}}']
)
def test_bounds_are_named(folder, stage, content):
    (folder / "scores/bounds.json").write_text(content)
    refused(stage, folder, r"bounds\.json: damaged: .*delete it: `accel evaluate score` writes it anew")
    (folder / "scores/bounds.json").unlink()
    judge(folder)
    report(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"steps=4": 3}'])
def test_problems_are_named(folder, content):
    (folder / "problems.json").write_text(content)
    refused("report", folder, r"problems\.json: damaged")


@pytest.mark.parametrize("damage", ["header", "no header", "rows", "no rows"])
def test_features_are_named(folder, damage):
    (store,) = (folder / "features").iterdir()
    header, rows = store / "extractor.json", store / "rank-00000.f32"
    if damage == "header":
        header.write_text('{"name": 3, "dim": "2"}')
    elif damage == "no header":
        header.unlink()
    elif damage == "rows":
        rows.write_bytes(rows.read_bytes()[:-4])
    else:
        rows.unlink()
    refused("report", folder, r"features/mean_test@0.*; delete this folder and score again")


@pytest.mark.parametrize(
    ("stage", "file", "change", "says"),
    [
        ("run", "samples", {"prompt_id": "0"}, "'prompt_id' is a string"),
        ("score", "samples", {"image": None}, "'image' is null"),
        ("report", "samples", {"seconds": "fast"}, "'seconds' is a string"),
        ("report", "samples", {"sample": True}, "'sample' is a boolean"),
        ("score", "scores", {"metric": ["psnr"]}, "'metric' is a list"),
        ("report", "scores", {"value": {}}, "'value' is an object"),
        ("report", "sessions", {"versions": 3}, "'versions' is a number"),
        ("report", "sessions", {"command": "accel"}, "'command' is a string"),
    ],
)
def test_records_of_wrong_types_are_named_and_count_as_missing(folder, stage, file, change, says):
    path = folder / file / "rank-00000.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(lines[0]) | change), *lines[1:]]) + "\n")
    with pytest.warns(AccelWarning, match=rf"{file}/rank-00000\.jsonl, line 1: unreadable record \({says}\)"):
        STAGES[stage](folder)
    if (stage, file) == ("run", "samples"):  # made again, and the broken line is not the last word
        with pytest.warns(AccelWarning, match="line 1"):
            assert len(list(RunFolder(folder).samples())) == 8


def test_a_configuration_that_nobody_knows_is_named(folder):
    path = folder / "samples/rank-00000.jsonl"
    path.write_text(path.read_text().replace('"configuration": "steps=4"', '"configuration": "steps=5"'))
    for stage in ("score", "report"):
        refused(stage, folder, r"run\.json: names no configuration 'steps=5', of which there are images")


VALUES = [None, True, -1, 10**30, 0.5, "", "x", "../../x", [], [[]], {}, {"a": {}}]


def changed_somewhere(value, rng):
    """One value of a JSON tree is another one, or missing, or there is one more."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if isinstance(value, dict) and rng.random() < 0.2:
            return {k: v for k, v in value.items() if k != key} | {"extra": 1}
        copied = value.copy()
        copied[key] = changed_somewhere(value[key], rng)
        return copied
    return rng.choice(VALUES)


@pytest.mark.filterwarnings("ignore::accel.errors.AccelWarning")
@pytest.mark.parametrize("number", range(CHANGES))
def test_no_change_of_any_record_is_a_traceback(folder, number):
    rng = random.Random(number)
    files = sorted(
        f for f in folder.rglob("*.json*") if not {"report", "images"} & set(f.relative_to(folder).parts)
    )
    file = rng.choice(files)
    if file.suffix == ".json":
        file.write_text(json.dumps(changed_somewhere(json.loads(file.read_text()), rng)))
    else:
        lines = file.read_text().splitlines()
        place = rng.randrange(len(lines))
        lines[place] = json.dumps(changed_somewhere(json.loads(lines[place]), rng))
        file.write_text("\n".join(lines) + "\n")
    for stage in rng.sample(list(STAGES.values()), 3):
        try:
            stage(folder)
        except AccelError as error:
            said = str(error)
            assert "\n" not in said


def test_what_is_whole_passes_every_stage(folder):
    for stage in STAGES.values():
        stage(folder)
    assert RunFolder(folder).settings["format"] == FORMAT
    with pytest.raises(RecordError, match=r"not a run folder \(no run\.json\)"):
        report(folder / "images")
