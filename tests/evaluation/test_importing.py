"""Existing pictures: paired by name, what has no partner or cannot be read is named and left out."""

import json
import unicodedata

import numpy as np
import pytest
from PIL import Image
from test_geneval import GOOD

from accel.evaluation import importing
from accel.evaluation.errors import AccelWarning, EvaluationError, MetadataError, RecordError
from accel.evaluation.folder import sample_key
from accel.evaluation.report import summarise
from accel.evaluation.score import score
from accel.evaluation.scorers import pixel_scorers


def picture(number, size=16):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8))


def pictures(folder, names):
    """The picture of a name is the same in every folder, but for one pixel of folder b."""
    folder.mkdir(parents=True)
    for name in names:
        image = picture(sum(map(ord, unicodedata.normalize("NFC", name.split(".")[0]))))
        image.putpixel((0, 0), (255, 0, 0) if folder.name == "b" else (0, 0, 0))
        image.save(folder / name)
    return folder


def scored(tmp_path, a, b):
    """{name: PSNR} of the pairs."""
    folder = importing.import_images(tmp_path / "run", {"a": a, "b": b})
    score(folder.path, pixel_scorers())
    return {r["prompt"]: r["value"] for r in folder.scores() if r["metric"] == "psnr"}


NAMES = [f"{i:04d}.png" for i in range(6)]


@pytest.mark.parametrize(
    ("b", "pairs", "says"),
    [
        (
            NAMES[:2] + NAMES[3:],
            5,
            r"'b' lacks 1 picture \(0002\.png\) of 'a'; left out, the other 5 are paired",
        ),
        (
            [*NAMES, "0006.png", "0007.png"],
            6,
            r"'b' has 2 pictures \(0006\.png, 0007\.png\) that 'a' has not",
        ),
        (
            ["x.png", *NAMES[4:]],
            2,
            r"lacks 4 pictures \(0000\.png, 0001\.png, 0002\.png, \.\.\.\) .* and has 1 picture",
        ),
    ],
)
def test_what_is_missing_or_more_is_named_and_the_rest_paired_by_name(tmp_path, b, pairs, says):
    folders = pictures(tmp_path / "a", NAMES), pictures(tmp_path / "b", b)
    with pytest.warns(AccelWarning, match=says):
        found = scored(tmp_path, *folders)
    assert set(found) == {name[:4] for name in set(NAMES) & set(b)}
    assert len(found) == pairs
    # Another name's picture would be some 8 dB away, not one pixel.
    assert all(value is not None and value > 20 for value in found.values())


def test_names_are_the_same_however_they_are_written(tmp_path):
    a = [unicodedata.normalize("NFC", "äpfel-é.png"), "two.png", "three.jpeg.png"]
    b = [unicodedata.normalize("NFD", "äpfel-é.png"), "two.PNG", "three.jpeg.bmp"]
    found = scored(tmp_path, pictures(tmp_path / "a", a), pictures(tmp_path / "b", b))
    assert len(found) == 3
    assert min(found.values()) > 20


def test_nothing_in_common_is_an_error_and_no_run_folder(tmp_path):
    with pytest.raises(
        RecordError, match=r"no picture of 'b' has the name of one of 'a' \(x\.png, 0000\.png\)"
    ):
        scored(tmp_path, pictures(tmp_path / "a", NAMES), pictures(tmp_path / "b", ["x.png"]))
    assert not (tmp_path / "run").exists()


def test_two_files_of_one_name_are_named(tmp_path):
    a, b = pictures(tmp_path / "a", NAMES[:2]), pictures(tmp_path / "b", [*NAMES[:2], "0001.bmp"])
    with pytest.warns(AccelWarning, match=r"0001\.png: has the same name as 0001\.bmp; left out"):
        assert len(scored(tmp_path, a, b)) == 2


def test_what_cannot_be_read_is_named_once_and_in_no_number(tmp_path):
    a, b = pictures(tmp_path / "a", NAMES), pictures(tmp_path / "b", NAMES)
    (a / "0001.png").write_bytes((a / "0001.png").read_bytes()[:200])
    (b / "0002.png").write_bytes(b"")
    with pytest.warns(AccelWarning) as caught:
        found = scored(tmp_path, a, b)
    assert sorted(str(w.message).split(": ")[0] for w in caught) == [str(a / "0001.png"), str(b / "0002.png")]
    assert set(found) == {"0000", "0003", "0004", "0005"}
    folder = importing.RunFolder(tmp_path / "run")
    assert summarise(folder)["images"] == 4
    picture(9).save(b / "0002.png")  # mended: scored when imported again
    with pytest.warns(AccelWarning, match=r"0001\.png: .*truncated"):
        assert set(scored(tmp_path, a, b)) == {"0000", "0002", "0003", "0004", "0005"}
    for file in b.iterdir():
        file.write_bytes(b"x")
    with pytest.warns(AccelWarning), pytest.raises(RecordError, match="none of its pictures can be read"):
        importing.import_images(tmp_path / "other", {"a": a, "b": b})


def layout(folder, samples, metadata=True):
    """GenEval's: {folder name: sample names}."""
    for number, (place, names) in enumerate(samples.items()):
        (folder / place / "samples").mkdir(parents=True)
        if metadata:
            line = GOOD | {"prompt": f"a photo of cat {int(place)}"}
            (folder / place / "metadata.jsonl").write_text("\ufeff" + json.dumps(line) + "\r\n")
        for name in names:
            image = picture(100 * number + int(name.split(".")[0]))
            image.putpixel((0, 0), (255, 0, 0) if folder.name == "b" else (0, 0, 0))
            image.save(folder / place / "samples" / name)
    return folder


def test_a_sample_that_is_missing_does_not_shift_the_others(tmp_path):
    """By their order 0002.png would be compared with 0001.png."""
    a = layout(tmp_path / "a", {"00000": ["0000.png", "0001.png", "0002.png"], "00001": ["0000.png"]})
    b = layout(tmp_path / "b", {"0": ["00000.png", "00002.png"], "1": ["00000.png"]})
    with pytest.warns(AccelWarning, match=r"'b' lacks 1 picture \(0001\.png\) of 'a'"):
        folder = importing.import_images(tmp_path / "run", {"a": a, "b": b})
    score(folder.path, pixel_scorers())
    found = {sample_key(r): r["value"] for r in folder.scores() if r["metric"] == "psnr"}
    assert set(found) == {("b", 0, 0), ("b", 0, 2), ("b", 1, 0)}
    assert min(found.values()) > 20
    assert folder.settings["suite"]["name"] == "geneval"


def test_folders_of_other_prompts_are_refused(tmp_path):
    a, b = (layout(tmp_path / name, {"00000": ["0000.png"]}) for name in "ab")
    (b / "00000/metadata.jsonl").write_text(json.dumps(GOOD | {"prompt": "a photo of a dog"}))
    with pytest.raises(RecordError, match=r"0000\.png: 'b' has another prompt here than 'a'"):
        importing.import_images(tmp_path / "run", {"a": a, "b": b})
    (b / "00000/metadata.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD))
    with pytest.raises(MetadataError, match=r"metadata\.jsonl: one line is expected, not 2"):
        importing.import_images(tmp_path / "run", {"a": a, "b": b})


def test_hidden_places_are_none(tmp_path):
    a = layout(tmp_path / "a", {"00000": ["0000.png"]}, metadata=False)
    (a / "00000/samples/._0000.png").write_bytes(b"Mac")
    (a / ".old/samples").mkdir(parents=True)
    picture(3).save(a / ".old/samples/0000.png")
    folder = importing.import_images(tmp_path / "run", {"a": a})
    assert [sample_key(record) for record in folder.samples()] == [("a", 0, 0)]


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (["a"], "takes NAME=FOLDER, not 'a'"),
        (["=x"], "takes NAME=FOLDER"),
        (["a="], "takes NAME=FOLDER"),
        (["a=x", "a=y"], "'a' is given twice"),
        (["a=/absent/folder"], "/absent/folder: no such image folder"),
        (["a/b=."], r"configuration name 'a/b'"),
    ],
)
def test_odd_images_options(tmp_path, images, says, monkeypatch):
    from accel.cli.evaluate import _folders

    monkeypatch.chdir(pictures(tmp_path / "here", ["x.png"]))
    with pytest.raises(EvaluationError, match=says):
        importing.import_images(tmp_path / "run", _folders(images))
    assert not (tmp_path / "run").exists()


class Flat:
    """A one-number extractor."""

    name, dim = "flat:test@0", 1

    def __call__(self, images):
        return images.float().mean((1, 2, 3))[:, None]


def test_a_reference_that_cannot_be_read_is_named_and_the_rest_measured(tmp_path):
    a, reference = pictures(tmp_path / "a", NAMES), pictures(tmp_path / "reference", NAMES)
    (reference / "0001.png").write_bytes(b"")
    (reference / "._0002.png").write_bytes(b"Mac")
    folder = importing.import_images(tmp_path / "run", {"a": a})
    with pytest.warns(
        AccelWarning, match=r"reference/0001\.png: cannot be decoded: it is empty; left out"
    ) as caught:
        score(folder.path, [], [Flat()], reference=reference)
    assert len(caught) == 1
    (row,) = summarise(folder)["distances"]
    assert row["reason"].startswith("'reference' has 5 images, 'a' 6: ")
    for file in reference.iterdir():
        file.write_bytes(b"")
    with (
        pytest.warns(AccelWarning),
        pytest.raises(RecordError, match="none of 6 reference images can be read"),
    ):
        score(folder.path, [], [Flat()], reference=reference)


def test_distances_are_over_what_has_features_in_every_configuration(tmp_path):
    folders = {name: pictures(tmp_path / name, NAMES) for name in "ab"}
    folder = importing.import_images(tmp_path / "run", folders)
    score(folder.path, pixel_scorers(), [Flat()])
    (index,) = (folder.path / "features").glob("*/rank-00000.jsonl")
    lines = index.read_text().splitlines()
    index.write_text("\n".join(lines[:-2]) + "\n")  # as a scoring that was stopped leaves it
    summary = summarise(folder)
    assert [row["n"] for row in summary["distances"]] == [4]
    assert [note for note in summary["notes"] if "over the 4 of 6 images that have features" in note]


def test_pictures_smaller_than_a_metrics_window_get_a_reason(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        picture(ord(name), size=8).save(tmp_path / name / "x.png")
    folder = importing.import_images(tmp_path / "run", {name: tmp_path / name for name in "ab"})
    score(folder.path, pixel_scorers())
    found = {r["metric"]: (r["value"], r["reason"]) for r in folder.scores()}
    assert found["psnr"][0] is not None
    assert found["ssim"][0] is None
    assert "11" in found["ssim"][1]
