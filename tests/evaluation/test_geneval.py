"""GenEval's rules, one case for each, and all 553 prompts: made up, and the official ones where at hand."""

import json
import os

import pytest

from accel.evaluation.errors import MetadataError
from accel.evaluation.geneval import (
    COLORS,
    TASKS,
    Detection,
    Metadata,
    ObjectSpec,
    Rules,
    Verdict,
    aggregate,
    parse_line,
    read_metadata,
    relations,
    score,
    write_metadata,
)

CAT = ObjectSpec("cat")
HERE, FAR_RIGHT = (0, 0, 10, 10), (40, 0, 50, 10)


def cat(confidence=0.95, box=HERE, color=None):
    return Detection("cat", confidence, box, color)


def dog(confidence=0.95, box=FAR_RIGHT, color=None):
    return Detection("dog", confidence, box, color)


def prompt(tag, *include, exclude=()):
    return Metadata(tag, include, "a photo", exclude)


SINGLE = prompt("single_object", CAT)
COUNT_2 = prompt("counting", ObjectSpec("cat", 2), exclude=(ObjectSpec("cat", 3),))
RED = prompt("colors", ObjectSpec("cat", color="red"))
TWO_COLORS = prompt("color_attr", ObjectSpec("cat", color="red"), ObjectSpec("dog", color="blue"))
DOG_RIGHT = prompt("position", CAT, ObjectSpec("dog", position=("right of", 0)))

RULES = [
    # threshold: above 0.3, not at it
    ("seen", SINGLE, [cat(0.31)], True, ""),
    ("at the threshold", SINGLE, [cat(0.3)], False, "expected at least 1 cat, found 0"),
    ("other class", SINGLE, [dog()], False, "found 0"),
    ("more than asked for is fine", SINGLE, [cat(), cat(), dog()], True, ""),
    ("both classes", prompt("two_object", CAT, ObjectSpec("dog")), [cat(), dog()], True, ""),
    ("one of two", prompt("two_object", CAT, ObjectSpec("dog")), [cat()], False, "1 dog, found 0"),
    # counting: above 0.9, exactly as many
    ("count", COUNT_2, [cat(0.91), cat(0.95)], True, ""),
    ("count needs 0.9", COUNT_2, [cat(0.91), cat(0.9)], False, "at least 2 cat, found 1"),
    ("the third is not sure enough to count", COUNT_2, [cat(), cat(), cat(0.9)], True, ""),
    ("too many", COUNT_2, [cat(), cat(), cat()], False, "fewer than 3 cat, found 3"),
    # colour: of the most confident `count` only
    ("colour", RED, [cat(color="red")], True, ""),
    ("wrong colour", RED, [cat(color="blue")], False, "expected 1 red cat, found colour blue"),
    ("no statement about colour", RED, [cat()], False, "unknown"),
    ("colour of the top one counts", RED, [cat(0.5, color="red"), cat(0.6, color="blue")], False, "blue"),
    ("colour of the second does not matter", RED, [cat(0.7, color="red"), cat(0.6, color="blue")], True, ""),
    ("attributes", TWO_COLORS, [cat(color="red"), dog(color="blue")], True, ""),
    ("attributes swapped", TWO_COLORS, [cat(color="blue"), dog(color="red")], False, "red cat"),
    # position
    ("right", DOG_RIGHT, [cat(), dog()], True, ""),
    ("wrong side", DOG_RIGHT, [cat(box=FAR_RIGHT), dog(box=HERE)], False, "dog right of cat, found left of"),
    ("no target", DOG_RIGHT, [dog()], False, "no valid object for dog to be right of"),
    ("the top dog decides", DOG_RIGHT, [cat(), dog(0.6), dog(0.9, box=(-50, 0, -40, 10))], False, "right"),
    (
        "a target that failed its own condition is none",
        prompt("position", ObjectSpec("cat", color="red"), ObjectSpec("dog", position=("right of", 0))),
        [cat(color="blue"), dog()],
        False,
        "no valid object for dog",
    ),
    (
        "every pair must hold",
        prompt("position", ObjectSpec("cat", 2), ObjectSpec("dog", position=("right of", 0))),
        [cat(), cat(box=(60, 0, 70, 10)), dog()],
        False,
        "dog right of cat",
    ),
]


@pytest.mark.parametrize(
    ("name", "line", "detections", "correct", "reason"), RULES, ids=[r[0] for r in RULES]
)
def test_rules(name, line, detections, correct, reason):
    verdict = score(detections, line)
    assert verdict.correct is correct
    assert reason in verdict.reason
    assert bool(verdict.reason) is not correct


def test_at_most_sixteen_of_a_class_are_kept():
    many = prompt("single_object", ObjectSpec("cat", 17))
    assert not score([cat()] * 20, many).correct
    assert score([cat()] * 20, many, Rules(max_per_class=17)).correct
    # The sixteen are the most confident: a weak one early in the list must not take a place.
    weak_first = [cat(0.4, color="blue"), *[cat(0.8, color="red")] * 16]
    assert score(weak_first, prompt("colors", ObjectSpec("cat", 16, "red"))).correct


def test_verdict_shows_what_counted_most_confident_first():
    seen = score([cat(0.2), dog(0.5), cat(0.7)], SINGLE).counted
    assert [(d.label, d.confidence) for d in seen] == [("cat", 0.7), ("dog", 0.5)]


# Boxes of 10 x 10: the margin is 0.1 (10 + 10) = 2 pixels along each axis.
@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [
        (30, 0, {"right of"}),
        (-30, 0, {"left of"}),
        (0, 30, {"below"}),
        (0, -30, {"above"}),
        (0, 0, set()),
        (2, 0, set()),  # within the margin
        (2.5, 0, set()),  # 0.5 / 2.5 = 0.2 of the unshortened distance
        (4.0, 0, set()),  # (4 - 2) / 4 = 0.5 is not above 0.5
        (4.1, 0, {"right of"}),
        (30, 30, {"right of", "below"}),  # 28 / 42.4 = 0.66 on both axes
        (40, 20, {"right of"}),  # 18 / 44.7 = 0.40 downwards
        (-20, -20, {"left of", "above"}),  # 18 / 28.3 = 0.64
        (5, 5, set()),  # 3 / 7.07 = 0.42: normalised *before* the margin is taken off it would be 0.71
    ],
)
def test_relative_position_formula(dx, dy, expected):
    assert relations((dx, dy, dx + 10, dy + 10), (0, 0, 10, 10)) == expected


def test_larger_objects_need_more_distance():
    assert relations((30, 0, 40, 10), (0, 0, 10, 10)) == {"right of"}
    assert relations((30, 0, 190, 10), (-70, 0, 90, 10)) == {"right of"}  # 100 - 32 of 100
    assert relations((-20, 0, 140, 10), (-70, 0, 90, 10)) == set()  # 50 - 32 = 18 of 50


def perfect(line):
    """Detections that satisfy a line: objects on a line or column, 100 pixels apart."""
    step = {"right of": (100, 0), "left of": (-100, 0), "below": (0, 100), "above": (0, -100)}
    detections = []
    for number, spec in enumerate(line.include):
        x, y = step[spec.position[0]] if spec.position else (0, 300 * number)
        detections += [
            Detection(spec.label, 0.95, (x + 20 * i, y, x + 20 * i + 10, y + 10), spec.color)
            for i in range(spec.count)
        ]
    return detections


PUBLISHED = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
OFFICIAL = os.environ.get("ACCEL_GENEVAL_METADATA")


def made_up_line(tag, i):
    """A line of the official file's form, in its key order, over made-up classes."""
    a, b = f"thing{i % 79}", f"thing{(i + 1 + i // 79) % 79}"
    colors = COLORS[i % 10], COLORS[(i + 3) % 10]
    include = [{"class": a, "count": 1}]
    line = {"tag": tag, "include": include}
    if tag in ("two_object", "color_attr", "position"):
        include.append({"class": b, "count": 1})
    if tag == "counting":
        include[0]["count"] = 2 + i % 3
        line["exclude"] = [{"class": a, "count": 3 + i % 3}]
    if tag in ("colors", "color_attr"):
        for entry, color in zip(include, colors, strict=False):
            entry["color"] = color
    if tag == "position":
        include[1]["position"] = [("left of", "right of", "above", "below")[i % 4], 0]
    return line | {"prompt": f"a photo for {tag} {i}"}


@pytest.fixture(params=["made up", "official"])
def all_prompts(request, tmp_path):
    """All 553 lines: made up here in any case, the official ones (not ours to ship) where they are."""
    if request.param == "official":
        if not OFFICIAL:
            pytest.skip("ACCEL_GENEVAL_METADATA does not name GenEval's metadata file")
        return OFFICIAL
    lines = [made_up_line(tag, i) for tag, count in PUBLISHED.items() for i in range(count)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "all.jsonl"


def test_all_prompts_score_one_when_satisfied_and_zero_when_not(tmp_path, all_prompts):
    lines = read_metadata(all_prompts)
    assert len(lines) == 553
    best = aggregate(score(perfect(line), line) for line in lines)
    assert best.overall.value == 1.0
    assert {task: interval.n for task, interval in best.tasks.items()} == PUBLISHED
    assert aggregate(score([], line) for line in lines).overall.value == 0.0
    wrong = dict.fromkeys(PUBLISHED, 0)
    for line, other in zip(lines, [*lines[1:], lines[0]], strict=True):
        if line.tag == other.tag and line.include != other.include:
            wrong[line.tag] += score(perfect(other), line).correct
    assert all(count <= 0.05 * PUBLISHED[task] for task, count in wrong.items()), wrong
    write_metadata(tmp_path / "copy.jsonl", lines)
    with open(all_prompts) as original:
        assert [json.loads(line) for line in original] == [
            json.loads(line) for line in (tmp_path / "copy.jsonl").read_text().splitlines()
        ]


def test_overall_is_the_unweighted_mean_of_tasks():
    verdicts = [Verdict(True, "", "single_object", f"p{i}") for i in range(9)]
    verdicts += [Verdict(i == 0, "", "counting", f"q{i}") for i in range(3)]
    result = aggregate(verdicts)
    assert result.overall.value == pytest.approx((1 + 1 / 3) / 2)
    assert result.missing == tuple(t for t in TASKS if t not in ("single_object", "counting"))
    assert result.overall.n == 12


GOOD = {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tag": "singles"}, "tag 'singles' is none of single_object"),
        ({"include": []}, "'include' is empty"),
        ({"include": {}}, "'include' must be a list"),
        ({"include": ["cat"]}, r"include\[0\] must be an object"),
        ({"include": [{"class": "cat"}]}, r"include\[0\] lacks 'count'"),
        ({"include": [{"class": "cat", "count": 0}]}, "at least 1, not 0"),
        ({"include": [{"class": "cat", "count": True}]}, "at least 1, not True"),
        ({"include": [{"class": "cat", "count": 1, "colour": "red"}]}, "unknown key 'colour'.*color"),
        ({"include": [{"class": "cat", "count": 1, "color": "mauve"}]}, "color 'mauve' is none of"),
        ({"include": [{"class": "cat", "count": 1, "position": ["right of", 0]}]}, "does not come before"),
        (
            {"include": [*GOOD["include"], {"class": "a", "count": 1, "position": ["near", 0]}]},
            "relation 'near'",
        ),
        ({"exclude": [{"class": "cat", "count": 2, "color": "red"}]}, r"exclude\[0\] has unknown key"),
        ({"prompt": "  "}, "'prompt' must be a non-empty string"),
        ({"extra": 1}, "the line has unknown key 'extra'"),
    ],
)
def test_a_line_that_is_not_genevals_is_named(tmp_path, change, reason):
    file = tmp_path / "metadata.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | change) + "\n")
    with pytest.raises(MetadataError, match=rf"metadata\.jsonl, line 2: .*{reason}"):
        read_metadata(file)


def test_broken_files_are_named(tmp_path):
    file = tmp_path / "m.jsonl"
    for content, reason in [
        (b'{"tag": "si', "line 1: not a GenEval metadata line"),
        (b"", "no metadata lines"),
        (json.dumps(GOOD).encode() + b"\n\xff\xfe", r"not UTF-8 text \(byte 98, 0xff, in line 2\)"),
    ]:
        file.write_bytes(content)
        with pytest.raises(MetadataError, match=reason):
            read_metadata(file)
    with pytest.raises(MetadataError, match="cannot be read"):
        read_metadata(tmp_path / "absent.jsonl")
    assert parse_line(json.dumps(GOOD)).to_dict() == GOOD
