"""Who is fastest at a distance: what the table of the comparison says, from known numbers."""

from __future__ import annotations

from accel import ForecastConfig, TokenMergingConfig
from accel.bench import frontier, peers
from accel.evaluation.configurations import PLAIN, Configuration

CONFIGURATIONS = [
    Configuration("near", ForecastConfig()),
    Configuration("far", ForecastConfig(cycle=(0, 1))),
    Configuration("tomesd", TokenMergingConfig.tomesd()),
    Configuration("steps=12", steps=12),
    peers.Peer("theirs", package="diffusers", kind="MagCache"),
]
MACS = {PLAIN: 100, "far": 40}
ROWS = {"near": (2.0, 40, 35), "far": (3.0, 33, 27), "tomesd": (4, 17, 15), "steps=12": (2.1, 30, 29)}


def summary():
    rows = {**ROWS, "theirs": (1.6, 41, 36), PLAIN: (1.0, 99, 99), "unknown": (9.0, 50, 50)}
    return {
        "plain": PLAIN,
        "suite_metric": "scenes",
        "configurations": [
            {
                "name": name,
                "speed": {"denoiser": {"speedup": {"value": speedup}}},
                "metrics": {
                    "psnr": {"mean": {"value": mean}, "p10": p10},
                    "scenes": {"mean": {"value": 0.5}},
                },
            }
            for name, (speedup, mean, p10) in rows.items()
        ],
    }


def test_groups_and_the_fastest_of_each(tmp_path):
    items = frontier.entries(summary(), CONFIGURATIONS)
    assert [(e.name, e.group) for e in items] == [
        ("near", "accel"), ("far", "accel"), ("tomesd", "peers"), ("steps=12", "fewer steps"), ("theirs", "peers"),
    ]  # fmt: skip
    assert frontier.fastest(items, "accel", 30, "mean").name == "far"
    assert frontier.fastest(items, "accel", 30, "p10").name == "near"
    assert frontier.fastest(items, "peers", 42, "mean") is None
    frontier.plot(items, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000


def test_the_table_compares_with_the_fastest_of_the_others():
    every, mean, p10 = frontier.markdown(frontier.entries(summary(), CONFIGURATIONS, MACS)).split("\n## ")[1:]
    assert "| `tomesd` | peers | 4.00x |  | 17.0 | 15.0 | 0.500 |\n| `far` | accel | 3.00x | 2.50x |" in every
    assert "| 30 dB | 1.60x `theirs` | 2.10x `steps=12` | 3.00x `far` | 1.43 |" in mean
    assert "| 34 dB | 1.60x `theirs` | none: 1x | 2.00x `near` | 1.25 |" in mean
    assert "| 42 dB | none: 1x | none: 1x | none: 1x | slower |" in mean
    assert "| 28 dB | 1.60x `theirs` | 2.10x `steps=12` | 2.00x `near` | 0.95 |" in p10
