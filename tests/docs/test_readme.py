"""The README is one page, and what it says of presets and commands is so."""

from __future__ import annotations

import re

import pytest
from blocks import ROOT, blocks

from accel import configs, methods

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
PRESETS = ROOT / "docs/presets.md"


def rows(text: str, header: str) -> list[dict[str, str]]:
    """The table under a header that starts like this."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(header))
    keys = [cell.strip() for cell in lines[start].strip("|").split("|")]
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        found.append(dict(zip(keys, (c.strip() for c in line.strip("|").split("|")), strict=True)))
    return found


def test_one_page():
    assert len(TEXT.splitlines()) <= 150


def test_five_numbers_each_with_its_model_and_device():
    table = rows(TEXT, "| | speedup")
    assert len(table) == 5
    assert all(row["model"] and row["device"] and "x" in row["speedup, whole call"] for row in table)


def test_every_number_of_the_table_was_measured():
    """Each figure stands in a table under docs/measured, beside the command that makes it."""
    measured = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs/measured").glob("*.md"))
    table = [line for line in TEXT.splitlines() if re.match(r"\| .*CPU core|\| .*the same \|", line)]
    figures = re.findall(r"\d+\.\d+x \[[^\]]+\]|\d+\.\d+ dB|−\d\.\d+ \[[^\]]+\]|\d+\.\d+x", "\n".join(table))
    assert len(figures) >= 12
    assert [f for f in figures if f not in measured.replace("**", "")] == []


def test_the_two_commands_are_what_ci_runs():
    (two,) = [b.text for b in blocks(README) if "accel demo  " in b.text]
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "pip install . && accel demo" in two
    assert 'pip install ".[test]" && pytest' in two
    assert re.search(r'^pip install -q "\.\[test\]"$', ci, re.MULTILINE)
    assert ci.rstrip().endswith("\npytest")


@pytest.mark.parametrize("text", [TEXT, PRESETS.read_text(encoding="utf-8")], ids=["README", "presets"])
def test_what_is_said_of_presets(text):
    table = {row["preset"].strip("`"): row for row in rows(text, "| preset |")}
    assert set(table) >= set(configs.names()) - {"tomesd"}
    for name, row in table.items():
        config = configs.load(name)
        assert row.get("method", methods.name_of(config)) == methods.name_of(config)
        if methods.name_of(config) == "speculative_decoding":
            continue
        computed = sum(phase.budget > 0 for phase in config.full_schedule.phases(24))
        assert row["of 24 steps computed"] in (str(computed), "all" if computed == 24 else ""), name


def test_every_preset_has_its_row():
    assert {row["preset"].strip("`") for row in rows(PRESETS.read_text(), "| preset |")} == set(
        configs.names()
    )


@pytest.mark.parametrize("word", ["unfortunately", "sorry", "not yet", "yet.", "we wanted", "TODO"])
def test_it_does_not_apologise(word):
    assert word not in TEXT
