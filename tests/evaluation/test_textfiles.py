"""Prompt files, metadata and JSON as other people's editors and programs write them."""

import json

import pytest
from test_geneval import GOOD

from accel.evaluation import suites
from accel.evaluation.errors import AccelWarning, MetadataError
from accel.evaluation.geneval import parse_line, read_metadata
from accel.evaluation.importing import official_results, same_rules
from accel.evaluation.textfiles import parse_json, split_lines


def texts(tmp_path, content, name="p.txt"):
    (tmp_path / name).write_bytes(content)
    return [prompt.text for prompt in suites.prompt_file(tmp_path / name).prompts]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_marks_and_line_ends_are_no_part_of_prompts(tmp_path, mark, end):
    lines = ["a red circle", "", "  a blue square ", "🐱 a\u2028cat\x0cand\x85more"]
    content = mark + end.join(lines).encode() + end.encode()
    assert texts(tmp_path, content) == ["a red circle", "a blue square", "🐱 a\u2028cat\x0cand\x85more"]
    described = mark + end.join(json.dumps(GOOD) for _ in range(2)).encode() + end.encode()
    (tmp_path / "m.jsonl").write_bytes(described)
    assert [line.prompt for line in read_metadata(tmp_path / "m.jsonl")] == [GOOD["prompt"]] * 2


def test_a_run_reads_back_the_prompts_it_wrote(tmp_path):
    (tmp_path / "p.txt").write_text("a\u2028cat\nzwei Äpfel\n")
    suite = suites.prompt_file(tmp_path / "p.txt")
    written = "".join(prompt.to_json() + "\n" for prompt in suite.prompts)
    read = [suites.Prompt.from_json(line, "p", i) for i, line in enumerate(split_lines(written), 1)]
    assert read == suite.prompts


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            "ein Käse\nzwei Käse\n".encode("latin-1"),
            r"p\.txt: not UTF-8 text \(byte 5, 0xe4, in line 1\); save it",
        ),
        ("gut\r\nzwei Käse".encode("latin-1"), r"byte 11, 0xe4, in line 2"),
        ("a cat\n".encode("utf-16"), "UTF-16"),
        ("a cat\n".encode("utf-16-le"), "a zero byte at 1"),
        (b"\n\r\n  \n", "no prompts in the file"),
        (b"\xef\xbb\xbf", "no prompts in the file"),
    ],
)
def test_what_is_no_text_is_refused_by_file_and_byte(tmp_path, content, says):
    with pytest.raises(MetadataError, match=says) as caught:
        texts(tmp_path, content)
    assert str(tmp_path / "p.txt") in str(caught.value)
    (tmp_path / "m.jsonl").write_bytes(content)
    with pytest.raises(MetadataError, match=r"m\.jsonl"):
        read_metadata(tmp_path / "m.jsonl")


def test_json_lines_are_prompts_if_all_are(tmp_path):
    lines = b'{"prompt": "a cat"}\r\n\n{"prompt": " a \\u00e4pfel "}\n'
    assert texts(tmp_path, lines) == ["a cat", "a äpfel"]
    with pytest.warns(AccelWarning, match=r"only \"prompt\" is used of its lines, not 'seed'"):
        assert texts(tmp_path, b'{"prompt": "a cat", "seed": 7}\n') == ["a cat"]
    with pytest.raises(MetadataError, match=r"p\.txt, line 2: not an object .*every line is one, or none"):
        texts(tmp_path, lines[:21] + b"a dog\n")
    for bad in (
        b'{"text": "a cat"}\n',
        b'["a cat"]\n',
        b"a cat\n",
        b'{"prompt": 3}\n',
        b'{"prompt": "\\ud800"}\n',
    ):
        with pytest.raises(MetadataError, match=r"p\.jsonl, line 1: not an object"):
            texts(tmp_path, bad, "p.jsonl")
    # No line of it is one: the text of a prompt may look like anything.
    assert texts(tmp_path, b'{"a": 1}\n[x]\n') == ['{"a": 1}', "[x]"]


DEEP = "[" * 3000 + "]" * 3000


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (DEEP, "nested too deeply"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ("[-Infinity]", "-Infinity is no JSON number"),
        ("1e999", "too large a number"),
        ('{"a": 1, "a": 2}', "key 'a' is given twice"),
        ('{"a": ', "Expecting value"),
        (b'"\xff"', "not UTF-8"),
        ("9" * 5000, "digits"),
    ],
)
def test_json_is_strict(text, says):
    with pytest.raises(ValueError, match=says):
        parse_json(text)
    assert parse_json('{"a": [1, 2.5, null, "x"]}') == {"a": [1, 2.5, None, "x"]}


@pytest.mark.parametrize("line", [DEEP, "3", "null", '"x"', "[]", '{"tag": NaN}', json.dumps(GOOD)[:-1], ""])
def test_bad_metadata_of_every_kind_is_one_line(line):
    with pytest.raises(MetadataError, match=r"m\.jsonl, line 4: not a GenEval metadata line") as caught:
        parse_line(line, "m.jsonl", 4)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("key", sorted(GOOD))
@pytest.mark.parametrize("value", [None, 3, True, [], {}, [[]], [{"class": [], "count": {}}]])
def test_a_wrong_type_anywhere_in_metadata_is_named(key, value):
    with pytest.raises(MetadataError, match="not a GenEval metadata line"):
        parse_line(json.dumps(GOOD | {key: value}))


RESULT = {
    "filename": "0.png",
    "tag": "single_object",
    "prompt": "a photo of a cat",
    "correct": True,
    "reason": "",
}
RESULT |= {"metadata": json.dumps(GOOD), "details": json.dumps({"cat": [[0, 0, 5, 5, 0.9]]})}


@pytest.mark.parametrize(
    "change",
    [
        *({"tag": value} for value in (None, 3, [], "cats")),
        *({"correct": value} for value in (None, "yes", 2, [])),
        {"prompt": 3},
        {"reason": []},
        *({"details": text} for text in (3, "3", "[]", DEEP, '{"cat": 3}', '{"cat": [[0, 0, 5, 5]]}')),
        {"details": '{"cat": [[0, 0, 5, 5, "0.9"]]}'},
        {"metadata": 3},
    ],
)
def test_bad_official_results_are_one_line(tmp_path, change):
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps(RESULT) + "\n" + json.dumps(RESULT | change) + "\n")
    with pytest.raises(MetadataError, match=r"results\.jsonl, line 2: not a line of GenEval's results: "):  # noqa: PT012
        list(official_results(file))
        same_rules(file)
    file.write_text("\ufeff" + json.dumps(RESULT) + "\r\n")
    assert [verdict.correct for verdict in official_results(file)] == [True]
    assert same_rules(file)["agree"] == 1
