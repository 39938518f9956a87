"""Several hundred randomised bad inputs, over all commands: one line that begins with "error:", and code 2, always.

A failing case is drawn again by its id: `pytest tests/test_bad_inputs.py -k config-7`.
"""

import contextlib
import io

import pytest
from bad_inputs import FOLDER, MODEL, Case, cases

from accel.cli.app import main

ALL = dict(cases())


#: Inputs that accel.evaluation's own readers let through to a traceback.
@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("COLUMNS", "80")


def typed(arguments):
    """(exit code, stdout, stderr) of `accel ARGUMENTS`; whatever is no SystemExit escapes."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
        main(arguments)
    return left.value.code or 0, out.getvalue(), err.getvalue()


def errors(text):
    """The lines that are no warnings and no help."""
    return [line for line in text.splitlines() if line.startswith("error:")]


@pytest.mark.parametrize("case_id", ALL)
def test_is_refused_in_one_line(case_id, tmp_path):
    case = ALL[case_id]
    arguments = case.prepare(tmp_path)
    code, out, err = typed(arguments)
    told = f"{case_id}: accel {arguments!r}\nstdout: {out[-500:]!r}\nstderr: {err[-2000:]!r}"
    assert code == 2, told
    assert len(errors(err)) == 1, told
    assert err.splitlines()[-1].startswith("error:"), told
    assert len(errors(err)[0]) > len("error: x"), told
    assert "Traceback" not in err + out, told
    assert not out, told
    assert not set(err) & {"\x1b", "\r", "\u202e"}, told
    assert not [path for path in tmp_path.rglob("*.png") if MODEL not in path.parts], told


def test_there_are_enough_and_they_differ():
    assert len(ALL) >= 200
    assert len({str(case.arguments) + str(case.files) for case in ALL.values()}) > 200
    assert {case.arguments[0] for case in ALL.values()} >= {"generate", "demo", "evaluate", "bench", "info"}
    again = dict(cases())
    assert {name: case.arguments for name, case in again.items()} == {
        name: case.arguments for name, case in ALL.items()
    }


def test_what_is_right_is_not_refused(tmp_path):
    """The control: the same linked folder, undamaged, with strange words that are only words."""
    case = Case("control", ["generate", "star [/x]", "--out", "{}/[bold]", "--steps", "1", "--size", "64"])
    case.copy, case.arguments = FOLDER, [*case.arguments, "--model", "{}/" + MODEL]
    code, out, err = typed(case.prepare(tmp_path))
    assert code == 0, err
    assert "[/x]" in out
    assert "[bold]" in out
    assert len(list((tmp_path / "[bold]").glob("*.png"))) == 1
