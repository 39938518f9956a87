"""`accel bench ar --arch` at tiny sizes: rows that can be continued, bounds that are counted, ways that run what they say."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from accel.cli.app import app
from accel.evaluation.bench import autoregressive_rows as rows
from accel.evaluation.bench import autoregressive_shapes as shapes
from accel.pipelines.autoregressive.model import PromptedModel

CPU = torch.device("cpu")


def run(path, names=("janus-1b",), **options):
    options = {"batches": (1, 2), "windows": (4,), "ways": ("eager", "transformers"), "dry": True, **options}
    said = []
    page = rows.bench_shapes(path, list(names), CPU, torch.float32, say=said.append, **options)
    return json.loads(page.with_suffix(".json").read_text())["rows"], said, page.read_text()


def cases(found):
    return [(row["batch"], row["window"], row["way"]) for row in found]


def test_rows_are_measured_once(tmp_path, monkeypatch):
    found, said, text = run(tmp_path, batches=(1,))
    assert cases(found) == [(1, 1, "eager"), (1, 1, "transformers"), (1, 4, "eager")]
    assert len(said) == 3
    assert all(0 < row["least_ms"] <= row["ms"] for row in found)
    token = found[0]
    assert token["image_s"] == pytest.approx(token["ms"] / 1000 * 16)  # tiny images have 16 tokens
    assert f"| janus-1b | 1 | 1 | {token['ms']:.2f} |" in text
    assert "transformers, ms" in text
    again, said, _ = run(tmp_path)
    assert again[:3] == found
    assert cases(again[3:]) == [(2, 1, "eager"), (2, 1, "transformers"), (2, 4, "eager")]
    monkeypatch.setattr(rows, "measure", lambda *a, **k: pytest.fail("all is known"))
    assert run(tmp_path)[0] == again


def test_columns_of_what_is_asked_for(tmp_path):
    """Computed here by hand: beyond the forward, images per second against one at a time, memory against eager code."""
    found, said, _ = run(tmp_path, batches=(1,), windows=(), ways=("eager",))
    assert found[0]["forward_ms"] > 0
    assert "ms beyond the forward" in said[0]
    common = {
        "arch": "janus-1b", "device": "x", "dtype": "y", "dry": False, "window": 1, "bound_ms": 1.0, "weights_mib": 900,
        "problem": "", "least_ms": 1.0,
    }  # fmt: skip
    made = [
        {
            **common,
            "way": "eager",
            "batch": 1,
            "ms": 9.0,
            "forward_ms": 8.0,
            "image_s": 9.0,
            "memory_mib": 100,
        },
        {
            **common,
            "way": "captured",
            "batch": 1,
            "ms": 2.0,
            "forward_ms": 1.8,
            "image_s": 2.0,
            "memory_mib": 250,
        },
        {
            **common,
            "way": "captured",
            "batch": 16,
            "ms": 4.0,
            "forward_ms": 3.75,
            "image_s": 0.25,
            "memory_mib": 900,
        },
    ]
    head, _, one, many = rows.table(made)
    assert head.endswith("| beyond the forward, ms | images/s over 1 | memory over eager |")
    assert one.endswith("| 4.5x | 0.20 | 1.0x | +15.0% |")
    assert many.endswith("| 0.25 | – | 0.25 | 8.0x | – |")
    assert rows.table([{**made[1], "forward_ms": None, "ms": None, "image_s": None}])[-1].endswith(
        "| – | – | – | – |"
    )


def test_time_that_is_over_begins_nothing(tmp_path):
    assert run(tmp_path, minutes=0)[0] == []


def test_a_way_that_fails_has_a_row_that_says_so_and_is_tried_again(tmp_path, monkeypatch):
    def fails(*inputs):
        raise RuntimeError("no such\ncache")

    monkeypatch.setattr(shapes, "_transformers", fails)
    found, said, _ = run(tmp_path, batches=(1,), windows=())
    assert [row["problem"] for row in found] == ["", "RuntimeError: no such cache"]
    assert found[1]["ms"] is None
    assert "transformers: RuntimeError: no such cache" in said[1]
    monkeypatch.undo()
    found, _, text = run(tmp_path, batches=(1,), windows=())
    assert cases(found)[2:] == [(1, 1, "transformers")]
    assert found[2]["ms"] > 0
    assert "no such" not in text


def test_the_bound_counts_weights_and_half_of_the_keys():
    small = shapes.tiny(shapes.ARCHITECTURES["emu3"])
    adapter = shapes.build(small, CPU, torch.float32)
    width, head = small.width, small.width // small.heads
    layer = 2 * width * width + 2 * width * small.kv_heads * head + 3 * width * small.inner + 2 * width
    weights = small.layers * layer + width + width * small.codes
    rotary_places = shapes.PROMPT + 8
    keys = small.layers * 2 * rotary_places * small.kv_heads * head
    for batch in (1, 3):
        assert shapes.bytes_read(adapter, batch, 16) == 4 * (weights + 2 * batch * keys)


@pytest.mark.parametrize("name", ["janus-1b", "emu3", "llamagen-xl"])
@torch.no_grad()
def test_the_stack_is_the_familys_own_forward(name):
    """With grouped keys, too: logits of a window after a token, by `hidden` and by `stack`."""
    adapter = shapes.build(shapes.tiny(shapes.ARCHITECTURES[name]), CPU, torch.float32)
    token_BW, results = torch.tensor([[1, 2, 3], [4, 5, 6]]), []
    for stack in (None, adapter.stack()):
        model = PromptedModel(adapter, adapter.layout(None, None), [1, 2], 3.0, stack=stack)
        model.forward(token_BW[:, :1], torch.tensor([0, 0]))
        results.append(model.forward(token_BW, torch.tensor([1, 0])))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
    assert results[0].std() > 0.01


def test_the_command(tmp_path):
    call = [
        "bench",
        "ar",
        str(tmp_path),
        "--arch",
        "janus-1b",
        "--tiny",
        "--batch-sizes",
        "1",
        "--device",
        "cpu",
    ]
    done = CliRunner().invoke(app, [*call, "--windows", "4", "--ways", "eager"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "report" / "shapes.md").is_file()
    for wrong, message in (
        (["--ways", "faster"], "--ways: 'faster' is none of captured, eager"),
        (["--windows", "0"], "--windows '0': expected whole numbers"),
    ):
        done = CliRunner().invoke(app, [*call, *wrong])
        assert done.exit_code != 0
        assert message in done.output or message in str(done.exception)
