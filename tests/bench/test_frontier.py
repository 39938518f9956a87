"""Who is fastest at a distance: what the table of the comparison says, from known numbers."""

from __future__ import annotations

from dataclasses import replace

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


def test_the_plot_has_a_panel_for_the_score_where_there_is_one():
    report = summary()
    assert frontier.plain_score(report) == 0.5
    items = frontier.entries(report)
    panels = frontier.plots(items, plain_score=0.5)
    assert [panel["label"][:5] for panel in panels] == ["PSNR ", "PSNR ", "score"]
    assert [[name for _, name in panel["lines"]] for panel in panels] == [[], [], ["plain"]]
    for panel in panels:
        assert {point["shown"] for point in panel["points"]} == {e.name for e in items}
        assert [name for name, *_ in panel["legend"]] == ["accel", "peers", "fewer steps"]
    mean = {point["name"]: point for point in panels[0]["points"]}
    assert (
        mean["theirs"]["y"] < mean["near"]["y"] < mean["far"]["y"]
    )  # 41, 40 and 33 dB, and y grows downwards
    ((left, y), (right, _)) = mean["far"]["bars"][0]
    assert left < mean["far"]["x"] < right
    assert y == mean["far"]["y"]
    assert len(frontier.plots([replace(e, score=None) for e in items])) == 2


def test_each_group_has_a_front_of_its_own():
    paths = frontier.plots(frontier.entries(summary()))[0]["paths"]
    assert [len(path.split()) for path in paths] == [2, 2, 1]


def test_names_at_one_score_do_not_cover_each_other():
    # Scores of 24 prompts are multiples of 1/24: most settings share one.
    items = [
        frontier.Entry(f"setting-{i}-taylor1", "peers", 1 + i / 10, 30 + i, 25 + i, (20 + i % 2) / 24, None)
        for i in range(20)
    ]
    score = frontier.plots(items, plain_score=20 / 24)[-1]
    boxes = []
    for point in score["points"]:
        width = 6.8 * len(point["shown"])
        left = point["label_x"] - (width if point["anchor"] == "end" else 0)
        boxes.append((left, point["label_y"] - 11, left + width, point["label_y"] + 3))
    for i, a in enumerate(boxes):
        assert 0 <= a[0] <= a[2] <= score["width"]
        for b in boxes[i + 1 :]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


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
