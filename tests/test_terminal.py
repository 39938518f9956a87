"""What reaches the terminal, and that Ctrl-C ends a command that is inside one long call."""

import re
import signal
import subprocess
import sys
import time

import pytest

from accel.cli import markdown, terminal
from accel.cli.app import main

# A call that never looks for signals, as one attention over a large image: minutes, without Python in between.
LONG = "import hashlib; print('ready', flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"


def started(code):
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)  # it is inside the call
    return process


def watched(grace, body=LONG):
    lines = body.replace("; ", "\n    ")
    return (
        f"from accel.cli.terminal import interrupts_end_soon\nwith interrupts_end_soon({grace}):\n    {lines}"
    )


def test_one_interrupt_ends_a_long_call_after_the_grace():
    process = started(watched(0.3))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "what is finished is kept" in err


def test_a_second_interrupt_ends_it_at_once():
    process = started(watched(600))
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130


def test_without_the_watch_a_long_call_goes_on():
    """The control: else the two tests above show nothing."""
    process = started(LONG)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    alive = process.poll() is None
    process.kill()
    process.communicate()
    assert alive


def test_what_sees_the_interrupt_ends_as_it_likes():
    body = "import time; print('ready', flush=True)"
    code = (
        watched(600, body)
        + "\n    try: time.sleep(600)\n    except KeyboardInterrupt: print('seen')\nprint('left')"
    )
    process = started(code)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "seen\nleft\n")


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("[/x][bold]:star: 猫 é", "[/x][bold]:star: 猫 é"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("a\nb\r\nc", "a b c"),
        ("a\u202eb\u200bc", r"a\u202eb\u200bc"),
        ("a\udcffb", r"a\udcffb"),
        ("\x9b31m", r"\x9b31m"),
    ],
)
def test_text_is_shown_and_never_obeyed(capsys, text, seen):
    terminal.say(text)
    assert capsys.readouterr().out == seen + "\n"
    terminal.complain("error", text, "bold red")
    assert capsys.readouterr().err == f"error: {seen}\n"


def test_a_terminal_that_knows_no_dash_gets_one_all_the_same():
    code = "from accel.cli import terminal; terminal.tolerate_narrow_encodings(); terminal.say('a – b')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stdout) == (0, "a \\u2013 b\n"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["genrate"], "error: No such command 'genrate'. Did you mean 'generate'? See: accel --help"),
        (["generate", "x", "--[/x]"], "--[/x]"),
        (["demo", "--seed", "-1"], "'--seed'"),
        (["evaluate", "run"], "See: accel evaluate run --help"),
    ],
)
def test_usage_errors_are_one_line(capsys, arguments, says):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    err = capsys.readouterr().err
    assert left.value.code == 2
    assert says in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_out_of_memory_is_one_line_and_other_errors_are_not_hidden(capsys, monkeypatch):
    def fails(error):
        def load(*args):
            raise error

        monkeypatch.setattr("accel.cli.common.load", load)
        main(["generate", "x", "--out", "/tmp/never-made"])

    with pytest.raises(SystemExit) as left:
        fails(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"))
    assert left.value.code == 2
    assert "error: out of memory" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        fails(RuntimeError("a mistake of ours"))


REPORT = r"""# Title

| configuration | PSNR (dB) | score |
| --- | --: | --- |
| **fast** | 41.2 \[39.0, 43.1] | [0.843](x.md) of `n` a\|b |
"""


@pytest.mark.parametrize("width", [80, 30])
def test_reports_are_shown_without_marks_and_with_whole_headers(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    markdown.show_report(REPORT)
    assert capsys.readouterr().out == REPORT  # into a pipe: Markdown
    monkeypatch.setattr(terminal.console, "_force_terminal", True)
    monkeypatch.setattr(terminal.console, "no_color", True)
    markdown.show_report(REPORT)
    out = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert not re.search(r"\*\*|`|\]\(|---|\\|^#", out, re.MULTILINE)
    for text in ("PSNR (dB)", "score", "fast", "41.2 [39.0, 43.1]", "0.843 of n a|b"):
        assert text in out
    assert ("configuration" in out) == (width == 80)
    assert ("PSNR (dB): 41.2" in out) == (width == 30)
