"""Records must survive a writer that is killed, a disk that lost a piece, and a second writer."""

import pytest

from accel.evaluation import records
from accel.evaluation.errors import AccelWarning, RecordError


def read(path):
    return list(records.read_records(path))


def test_an_incomplete_last_line_is_named_cut_off_and_written_again(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2')
    with pytest.warns(AccelWarning, match=r"r\.jsonl, line 2: .*cut off"):
        assert read(path) == [{"a": 1}]
    with pytest.warns(AccelWarning, match=r"r\.jsonl: the last record was cut off"):
        appender = records.Appender(path)
    appender.write({"a": 2}, {"a": 3})
    appender.close()
    assert read(path) == [{"a": 1}, {"a": 2}, {"a": 3}]


@pytest.mark.parametrize("length", [1, 65535, 65536, 65537, 200_000])
def test_an_incomplete_line_of_any_length_is_found(tmp_path, length):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b"x" * length)
    with pytest.warns(AccelWarning):
        records.Appender(path).close()
    assert path.read_bytes() == b'{"a": 1}\n'


def test_a_file_that_is_one_incomplete_line_becomes_empty(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"a":')
    with pytest.warns(AccelWarning):
        records.Appender(path).close()
    assert path.read_bytes() == b""


def test_a_broken_line_in_the_middle_is_named_and_the_rest_kept(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a"\n[3]\n\xff\n{"a": 5}\n')
    with pytest.warns(AccelWarning) as caught:
        assert read(path) == [{"a": 1}, {"a": 5}]
    assert [f"line {n}" in str(w.message) for n, w in zip((2, 3, 4), caught, strict=True)] == [True] * 3


def test_a_second_writer_is_refused(tmp_path):
    first = records.Appender(tmp_path / "r.jsonl")
    with pytest.raises(RecordError, match="another process is writing"):
        records.Appender(tmp_path / "r.jsonl")
    first.close()
    records.Appender(tmp_path / "r.jsonl").close()


def test_the_last_record_of_a_key_counts_across_files(tmp_path):
    (tmp_path / "rank-0.jsonl").write_text('{"k": 1, "v": "old"}\n{"k": 2, "v": "b"}\n{"k": 1, "v": "new"}\n')
    (tmp_path / "rank-1.jsonl").write_text('{"k": 3, "v": "c"}\n')
    latest = records.latest_records(tmp_path.glob("*.jsonl"), lambda r: r["k"])
    assert [(r["k"], r["v"]) for r in latest] == [(2, "b"), (1, "new"), (3, "c")]


def test_not_a_number_is_never_written(tmp_path):
    with (
        records.Appender(tmp_path / "r.jsonl") as appender,
        pytest.raises(ValueError, match="not JSON compliant"),
    ):
        appender.write({"value": float("inf")})


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    records.write_atomically(path, b"old")
    monkeypatch.setattr(records.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        records.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["image.png"]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8, 1)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, (1, 2, 0)),
        ({"RANK": "3"}, (0, 1, 0)),
    ],
)
def test_rank_comes_from_the_launcher(monkeypatch, variables, expected):
    for names in records._RANK_VARIABLES:
        for name in names:
            monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert records.rank_and_world() == expected
