"""Commands in the documentation: their options exist, their presets load, their scripts are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
from blocks import ALL, ROOT

from accel import configs
from accel.cli.app import app

#: Of click, or of the click that newer versions of typer carry.
UsageError = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "UsageError")
SHELL = [block for block in ALL if block.language in ("bash", "sh", "console")]


def commands(text: str) -> list[list[str]]:
    """The words of each command: lines joined, comments left out, split at && and |."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words, current = shlex.split(line, comments=True), []
        for word in [*words, "&&"]:
            if word in ("&&", "|", ";"):
                found += [current] if current else []
                current = []
            else:
                current.append(word)
    return found


def accel_part(words: list[str]) -> list[str] | None:
    """What follows `accel`, also behind a launcher (`accelerate launch … --no_python accel …`)."""
    return words[words.index("accel") + 1 :] if "accel" in words else None


def parse(words: list[str]) -> dict[str, object]:
    """The options as the program would read them, nothing being run.

    Raises:
        UsageError: no such command or option, a value of another type, or an argument is missing.
    """
    command: Any = typer.main.get_command(app)
    context = command.context_class(command, info_name="accel")
    while hasattr(command, "resolve_command"):
        title, command, words = command.resolve_command(context, words)
        context = command.context_class(command, info_name=title, parent=context)
    options, rest, _ = command.make_parser(context).parse_args(list(words))
    for parameter in command.params:
        parameter.handle_parse_result(context, options, rest)
    return options


ACCEL = [
    (block.where, part)
    for block in SHELL
    for words in commands(block.text)
    if (part := accel_part(words)) is not None
]


@pytest.mark.parametrize(("where", "words"), ACCEL, ids=[f"{w} accel {' '.join(p)[:40]}" for w, p in ACCEL])
def test_the_command_is_understood(where, words):
    options = parse(words)
    if preset := options.get("preset"):
        assert preset in configs.names()
    for name in options.get("config") or () if words[0] == "evaluate" else ():
        known(name)


def known(configuration: str) -> None:
    """`NAME`, `steps=N`, `NAME:PRESET,KEY=VALUE` …: as `accel evaluate -c` takes them."""
    source = re.split(r"[,]", configuration.rpartition(":")[2])[0]
    if not source.startswith("steps=") and not source.endswith(".yaml"):
        configs.load(source)


@pytest.mark.parametrize(
    "wrong",
    ["accel generat x", "accel demo --no-such", "accel evaluate run", "accel generate x --steps many"],
)
def test_a_wrong_command_is_noticed(wrong):
    ((words,),) = [commands(wrong)]
    with pytest.raises(UsageError):
        parse(accel_part(words) or [])


def test_a_wrong_configuration_is_noticed():
    with pytest.raises(ValueError, match="unknown preset"):
        known("mild:mergin,ratio=0.3")


def test_there_are_commands_to_check():
    assert len(ACCEL) > 20


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.where)
def test_scripts_are_there(block):
    for words in commands(block.text):
        for word in words:
            if word.startswith(("examples/", "scripts/", ".ci/")):
                assert (ROOT / word).is_file(), word


def script_options(script: Path) -> set[str]:
    return set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', script.read_text(encoding="utf-8")))


def test_options_of_scripts_exist():
    seen = 0
    for block in SHELL:
        for words in commands(block.text):
            for place, word in enumerate(words):
                if word.startswith(("examples/", "scripts/")) and word.endswith(".py"):
                    given = {w.split("=")[0] for w in words[place + 1 :] if w.startswith("--")}
                    assert given <= script_options(ROOT / word), (block.where, given)
                    seen += len(given)
    assert seen > 4
