"""Who is fastest at a distance: what the table of the comparison says, from known numbers."""

from __future__ import annotations

from dataclasses import replace

import matplotlib.figure
import pytest

from accel.evaluation.bench import frontier
from accel.evaluation.configurations import PLAIN

METHODS = {
    "near": {"type": "ForecastConfig"},
    "far": {"type": "TokenPruningConfig"},
    "tomesd": {"type": "TokenMergingConfig"},
    "steps=12": None,
    "theirs": {"type": "MagCache"},
    PLAIN: None,
}
MACS = {PLAIN: 100, "far": 40}
ROWS = {"near": (2.0, 40, 35), "far": (3.0, 33, 27), "tomesd": (4, 17, 15), "steps=12": (2.1, 30, 29)}


def summary():
    rows = {**ROWS, "theirs": (1.6, 41, 36), PLAIN: (1.0, 99, 99)}
    return {
        "plain": PLAIN,
        "suite_metric": "scenes",
        "configurations": [
            {
                "name": name,
                "settings": {"method": METHODS[name], "steps": None},
                "speed": {
                    "denoiser": {"speedup": {"value": speedup, "low": speedup - 0.1, "high": speedup + 0.2}}
                },
                "metrics": {
                    "psnr": {"mean": {"value": mean}, "p10": p10},
                    "scenes": {"mean": {"value": 0.5}},
                },
            }
            for name, (speedup, mean, p10) in rows.items()
        ],
    }


def test_groups_and_the_fastest_of_each():
    items = frontier.entries(summary())
    assert [(e.name, e.group) for e in items] == [
        ("near", "accel"), ("far", "accel"), ("tomesd", "peers"), ("steps=12", "fewer steps"), ("theirs", "peers"),
    ]  # fmt: skip
    assert frontier.fastest(items, "accel", 30, "mean").name == "far"
    assert frontier.fastest(items, "accel", 30, "p10").name == "near"
    assert frontier.fastest(items, "peers", 42, "mean") is None


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    return figures


def test_the_plot_has_a_panel_for_the_score_where_there_is_one(tmp_path, drawn):
    report = summary()
    assert frontier.plain_score(report) == 0.5
    items = frontier.entries(report)
    frontier.plot(items, tmp_path / "frontier.png", plain_score=0.5)
    mean, p10, score = drawn[0].axes
    assert [axes.get_ylabel()[:5] for axes in (mean, p10, score)] == ["PSNR ", "PSNR ", "score"]
    labels = {line.get_label(): list(line.get_ydata()) for line in score.lines}
    assert labels["plain"] == [0.5, 0.5]
    for axes in drawn[0].axes:
        assert {text.get_text() for text in axes.texts} - {""} == {e.name for e in items}
    frontier.plot([replace(e, score=None) for e in items], tmp_path / "frontier.png")
    assert len(drawn[1].axes) == 2


def test_names_at_one_score_do_not_cover_each_other(tmp_path, drawn):
    # Scores of 24 prompts are multiples of 1/24: most settings share one.
    items = [
        frontier.Entry(f"setting-{i}-taylor1", "peers", 1 + i / 10, 30 + i, 25 + i, (20 + i % 2) / 24, None)
        for i in range(20)
    ]
    frontier.plot(items, tmp_path / "frontier.png", plain_score=20 / 24)
    score = drawn[0].axes[-1]
    boxes = [text.get_window_extent() for text in score.texts if text.get_text()]
    assert len(boxes) == 20
    assert [box.count_overlaps(boxes) for box in boxes] == [1] * 20  # itself
    assert all(score.bbox.count_contains(box.corners()) == 4 for box in boxes)


def test_what_has_no_ratio_is_named_and_not_drawn():
    report = summary()
    report["configurations"][0]["speed"]["denoiser"]["speedup"] = None  # plain was timed in another start
    report["configurations"][1]["metrics"]["psnr"] = {"identical": 4}
    items = frontier.entries(report)
    assert frontier.left_out(report, items) == ["near", "far"]
    assert "Not in these tables: `near`, `far`." in frontier.markdown(items, ["near", "far"])
    report["configurations"][2]["speed"]["denoiser"]["speedup"] |= {"low": None, "high": None}
    assert "| `tomesd` | peers | 4.00x |" in frontier.markdown(frontier.entries(report))


def test_the_table_compares_with_the_fastest_of_the_others():
    every, mean, p10 = frontier.markdown(frontier.entries(summary(), MACS)).split("\n## ")[1:]
    assert "| `tomesd` | peers | 4.00x [3.90, 4.20] |  | 17.0 | 15.0 | 0.500 |\n" in every
    assert "| `far` | accel | 3.00x [2.90, 3.20] | 2.50x |" in every
    assert "| 30 dB | 1.60x `theirs` | 2.10x `steps=12` | 3.00x `far` | 1.43 |" in mean
    assert "| 34 dB | 1.60x `theirs` | none: 1x | 2.00x `near` | 1.25 |" in mean
    assert "| 42 dB | none: 1x | none: 1x | none: 1x | slower |" in mean
    assert "| 28 dB | 1.60x `theirs` | 2.10x `steps=12` | 2.00x `near` | 0.95 |" in p10
