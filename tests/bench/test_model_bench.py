"""`accel bench model`: what it builds, what its rows are, and that its numbers are those of the loop."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import flux_call, make_flux

from accel.core.schedule import Schedule
from accel.errors import AccelError, ConfigError, UnknownNameError
from accel.evaluation.bench import architectures, model, model_report, model_rows
from accel.evaluation.bench.peers import Peer
from accel.methods.merging import TokenMergingConfig

CPU = {"device": "cpu", "dtype": torch.float32}


def published(name):
    """Billions of weights of the real shapes, of which none is made."""
    import diffusers
    from accelerate import init_empty_weights

    own = architectures.ARCHITECTURES[name]
    config = {**own.config, "pos_embed_max_size": 64} if name == "sd3" else own.config  # a table, no weights
    with init_empty_weights(include_buffers=False):
        module = getattr(diffusers, own.transformer)(**config)
    return sum(weight.numel() for weight in module.parameters()) / 1e9


@pytest.mark.parametrize(
    ("name", "billions"), [("flux1", 11.9), ("flux2", 32.2), ("qwen", 20.4), ("zimage", 6.15), ("sd3", 8.06)]
)
def test_the_shapes_have_as_many_weights_as_the_published_checkpoints(name, billions):
    assert published(name) == pytest.approx(billions, rel=0.005)


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_every_architecture_runs_in_its_pipeline_and_a_preset_skips_steps_of_it(name):
    import accel

    own = architectures.build(name, torch.device("cpu"), torch.float32, tiny=True)
    call = {**own.arguments, "height": 128, "width": 96, "num_inference_steps": 8, "output_type": "latent"}

    def latents():
        return own.pipe(**call, generator=torch.Generator().manual_seed(0)).images

    own.pipe.set_progress_bar_config(disable=True)
    plain = latents()
    assert plain.isfinite().all()
    assert 0.1 < plain.std() < 10
    with accel.accelerate(own.pipe, TokenMergingConfig(ratio=0.5)) as handle:
        merged = latents()
    assert not torch.equal(merged, plain)
    tokens = own.tokens(128) * 96 // 128
    blocks = handle.stats.steps[0].total // tokens
    # All blocks but the first at half of the tokens.
    assert handle.stats.steps[3].computed == tokens + (blocks - 1) * tokens // 2
    assert torch.equal(latents(), plain)


def test_weights_are_made_in_their_precision_and_always_the_same():
    made = [
        architectures.build("flux1", torch.device("cpu"), torch.bfloat16, tiny=True).pipe.transformer
        for _ in range(2)
    ]
    assert all(weight.dtype is torch.bfloat16 for weight in made[0].parameters())
    assert all(torch.equal(a, b) for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True))
    gains = made[0].transformer_blocks[0].attn.norm_q.weight
    assert (gains == 1).all()


@pytest.mark.parametrize("steps", [12, 24, 50])
def test_rows_are_read_as_they_are_named(steps):
    rows = model_rows.parse("plain, compiled,merging-0.25+compiled+graphs,pruning-0.3-alone,fast+auto", steps)
    plain, compiled, merging, pruning, fast = rows
    assert (plain.compile, plain.schedule()) == (False, ["dense"] * steps)
    assert (compiled.base, compiled.compile) == ("plain", "blocks")
    assert (merging.configuration.method.ratio, merging.compile) == (0.75, "blocks+graphs")
    assert merging.schedule() == ["dense"] * 2 + ["reduced"] * (steps - 2)
    assert (pruning.configuration.method.budget, pruning.configuration.method.keys_values) == (0.3, "none")
    assert (fast.compile, fast.schedule().count("skipped")) == (True, model_rows.mask(steps, "fast").count(0))
    # Steps that are all alike are timed in a short loop, forecasts where they are in the picture.
    assert (merging.steps, fast.steps) == (10, steps)


def test_a_row_may_run_at_one_size_only(tmp_path):
    assert model_rows.parse("plain+compiled@512", 24)[0].size == 512
    with pytest.raises(ConfigError, match="plain@512"):
        model_rows.parse("plain@small", 24)
    with pytest.raises(ConfigError, match="not accel's"):
        model_rows.parse("magcache+graphs", 24)
    model.bench(tmp_path, "flux1", [96, 128], "plain@128,balanced@128", tiny=True, steps=6, rounds=1, **CPU)
    rows = json.loads((tmp_path / model.RESULTS).read_text())["rows"]
    assert [(row["row"], row["size"]) for row in rows] == [("plain", 128), ("balanced", 128)]


@pytest.mark.parametrize(
    "name", ["mergin-0.5", "merging-1.5", "merging", "plain+compile", "merging-0", "merging-0.5-alone"]
)
def test_unknown_rows_are_named_with_the_known_ones(name):
    if name == "merging":  # the preset
        assert model_rows.parse(name, 24)[0].configuration.method.ratio == 0.5
        return
    with pytest.raises(UnknownNameError, match=r"Known: .*(compiled|merging-0\.5)"):
        model_rows.parse(name, 24)


def test_every_row_can_be_read():
    for device in ("cpu", "cuda:1"):
        rows = model_rows.parse(",".join(model_rows.every(device)), 24)
        assert len({row.name for row in rows}) == len(rows)
        assert any(model_rows.GRAPHS in row.ways for row in rows) == (device != "cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "flux1"
    said: list[str] = []
    only_small = ("windows-0.5", "chunking-0.5", "pruning-0.3", "balanced", *model_rows.PEERS)
    rows = ",".join(
        ["plain", "merging-0.5", *(f"{name}@128" for name in only_small if "cache-dit" not in name)]
    )
    page = model.bench(
        folder, "flux1", [128, 256], rows, tiny=True, steps=12, rounds=1, done=said.append, **CPU
    )
    return SimpleNamespace(folder=folder, page=page, said=said, rows=rows)


def found(finished, name, size=128):
    rows = json.loads((finished.folder / model.RESULTS).read_text())["rows"]
    return next(row for row in rows if (row["row"], row["size"]) == (name, size))


def test_what_steps_computed_is_what_the_configuration_says(finished):
    assert found(finished, "plain")["kinds"] == ["dense"] * 10
    assert found(finished, "merging-0.5")["kinds"] == ["dense"] * 2 + ["reduced"] * 8
    assert found(finished, "pruning-0.3")["ms"]["reduced"]["n"] == 8
    for same in ("windows-0.5", "chunking-0.5"):
        assert found(finished, same)["kinds"] == found(finished, "merging-0.5")["kinds"]
    balanced = found(finished, "balanced")["kinds"]
    assert [kind != "skipped" for kind in balanced] == [bool(x) for x in model_rows.mask(12, "balanced")]


def test_peers_compute_the_very_steps_of_the_row_beside_them(finished):
    for peer, like, skipped in (("taylorseer", "forecast-3rd", 4), ("magcache", "forecast-2nd", 3)):
        theirs, ours = found(finished, peer), found(finished, like)
        assert theirs["kinds"] == ours["kinds"]
        assert theirs["kinds"].count("skipped") == skipped
    assert ours["ms"]["skipped"]["median"] < theirs["ms"]["dense"]["median"] / 3


@pytest.mark.parametrize("arch", ["flux1", "qwen"])  # one call a step, and two
def test_cache_dit_computes_the_preset_s_very_steps(tmp_path, arch):
    pytest.importorskip("cache_dit")
    model.bench(tmp_path, arch, [128], "cache-dit-balanced,balanced", tiny=True, steps=12, rounds=1, **CPU)
    theirs, ours = json.loads((tmp_path / model.RESULTS).read_text())["rows"]
    assert theirs["kinds"] == ours["kinds"]


def test_plans_are_timed_where_plans_are_built(finished):
    merging = found(finished, "merging-0.5")
    assert merging["plan_build_ms"]["n"] == merging["kinds"].count("reduced")
    assert 0 < merging["plan_build_ms"]["median"] < merging["ms"]["reduced"]["median"]
    assert found(finished, "pruning-0.3")["plan_build_ms"] is None


def test_a_plan_and_its_use_cost_under_a_twentieth_of_the_built_in_model_s_forward():
    """In time of the processor, which other load does not lengthen. Measured: 1.1 to 1.3 %."""
    import accel

    own = architectures.build("builtin", torch.device("cpu"), torch.float32)
    own.pipe.set_progress_bar_config(disable=True)
    forwards, plans = [], []

    def spent(call, into):
        def timed(*args, **kwargs):
            started = time.process_time()
            result = call(*args, **kwargs)
            into.append(time.process_time() - started)
            return result

        return timed

    config = TokenMergingConfig(ratio=0.5, schedule=Schedule(dense_first=2, dense_last=0, refresh_every=1))
    with accel.accelerate(own.pipe, config) as handle:
        method = handle._method()
        build = method.build

        def build_and_use(x_BNC, grid):
            plan = build(x_BNC, grid)
            y_BKC = plan.reduce(x_BNC)
            x_BNC + plan.expand(y_BKC - y_BKC)
            return plan

        method.build = spent(build_and_use, plans)
        own.pipe.transformer.forward = spent(own.pipe.transformer.forward, forwards)
        arguments = {**own.arguments, "true_cfg_scale": 1.0}
        own.pipe(**arguments, height=256, width=256, num_inference_steps=4, output_type="latent")
        del own.pipe.transformer.forward, method.build
    assert len(plans) == 2
    assert min(plans) <= 0.05 * min(forwards[:2])  # of the two dense steps


def test_the_report_has_every_row_at_every_size_and_says_what_it_is(finished):
    text = finished.page.read_text()
    for size, tokens in ((128, 64), (256, 256)):
        assert f"## {size} x {size} pixels, {tokens} image tokens" in text
    assert (text.count("| merging-0.5 |"), text.count("| forecast-3rd |")) == (2, 1)
    assert "say nothing about pictures" in text
    assert "a trial of the bench" in text
    assert len(finished.said) == 12
    assert "merging-0.5: dense ms" in finished.said[2]
    assert "<svg" in (finished.folder / "model.svg").read_text()


def test_a_stopped_bench_continues(finished, monkeypatch):
    tried: list[str] = []

    def count(of, row, size, rounds):
        tried.append(row.name)
        return {"problem": "none of these is timed"}

    monkeypatch.setattr(model, "_tried", count)
    settings = {"tiny": True, "steps": 12, **CPU}
    before = (finished.folder / model.RESULTS).read_text()
    model.bench(finished.folder, "flux1", [256, 128], finished.rows, **settings)
    assert tried == []
    for _ in range(2):  # what failed is tried again
        page = model.bench(finished.folder, "flux1", [128], "fast", **settings)
    assert tried == ["fast", "fast"]
    assert page.read_text().count("none of these is timed") == 1
    with pytest.raises(AccelError, match="choose another --out"):
        model.bench(finished.folder, "flux1", [128], "plain", **{**settings, "steps": 24})
    (finished.folder / model.RESULTS).write_text(before)


def test_rows_beyond_the_minutes_are_named_and_left_for_the_next_start(tmp_path):
    settings = {"tiny": True, "steps": 12, **CPU}
    page = model.bench(tmp_path, "flux1", [128], "plain", minutes=1e-9, **settings)
    assert "not run: the 1e-09 minutes are over" in page.read_text()
    page = model.bench(tmp_path, "flux1", [128], "plain", minutes=1, **settings)
    assert "not run" not in page.read_text()


@pytest.mark.parametrize("size", [100, 16])
def test_sizes_that_do_not_fit_are_refused_before_anything_is_timed(tmp_path, size):
    with pytest.raises(AccelError, match="multiples of 32 pixels"):
        model.bench(tmp_path, "zimage", [128, size], "plain", tiny=True, **CPU)
    assert not (tmp_path / model.RESULTS).exists()


def flux_model():
    arguments = flux_call()
    for name in ("height", "width", "num_inference_steps", "output_type", "generator"):
        del arguments[name]
    return architectures.Model("flux", "a tiny FLUX", make_flux(), arguments, pixels=4)


def test_a_step_takes_as_long_as_its_denoiser_does():
    own = flux_model()
    steps = iter(range(100))

    def wait(*_):
        time.sleep(0.3 if next(steps) % 2 else 0)

    own.pipe.transformer.register_forward_pre_hook(wait)
    loop = model._loop(own, own.pipe, 32, 6)
    slow, quick = loop.step_ms[1::2], loop.step_ms[2::2]
    assert len(loop.step_ms) == 6
    assert min(slow) >= 300
    assert min(quick) < 250  # other load on the machine comes on top
    assert 1e3 * loop.seconds >= sum(loop.step_ms)


def test_a_row_shares_the_weights_and_leaves_the_model_alone():
    own = flux_model()
    with torch.no_grad():
        before = own.pipe(**flux_call()).images
    made = model._copy(own.pipe)
    assert made.transformer is not own.pipe.transformer
    assert made.scheduler is not own.pipe.scheduler
    pairs = zip(made.transformer.parameters(), own.pipe.transformer.parameters(), strict=True)
    assert all(a is b for a, b in pairs)
    for row in model_rows.parse("pruning-0.3,taylorseer", 12):
        assert "problem" not in model._tried(own, row, 32, 1)
    assert torch.equal(own.pipe(**flux_call()).images, before)
    assert not own.pipe.transformer._forward_pre_hooks


def test_a_row_that_fails_says_why_and_stops_nothing(monkeypatch):
    own = flux_model()
    gone = Peer("gone", package="no_such_package", kind="cache-dit", total=8, options={"mask": 1})
    result = model._tried(own, model_rows.Row("gone", gone, 8), 32, 1)
    assert result["problem"].startswith(("ModuleNotFoundError", "TypeError", "ValueError"))


def row(name, plain, **ms):
    entry = {
        "kinds": [],
        "graphs": None,
        "notes": [],
        "compiled": None,
        "plan_build_ms": None,
        "tokens": 64,
        "size": 512,
        "start": 0,
    }
    summaries = {which: {"median": value, "low": 0, "high": 0, "n": 1} for which, value in ms.items()}
    schedule = ["dense"] * 2 + [
        "reduced" if "reduced" in ms else "skipped" if "skipped" in ms else "dense"
    ] * 8
    more = {"host_ms": {}, "peak_bytes": 3 * 2**30, "first_seconds": 1.0, "schedule": schedule}
    return {**entry, **more, "row": name, "ms": summaries, "plain_ms": {"median": plain}}


def test_the_table_s_ratios_are_to_the_plain_loops_beside_each_row():
    # While the last row was timed, the machine was half as fast.
    rows = [
        row("plain", 100.0, dense=100.0),
        row("plain+compiled", 100.0, dense=80.0),
        row("merging-0.5", 200.0, dense=200.0, reduced=100.0),
        row("balanced", 100.0, dense=100.0, skipped=0.5),
    ]
    derived = model_report._rows({"rows": rows})
    table = {
        line[0]: dict(zip(model_report._HEADER, line, strict=True))
        for line in model_report.table(derived, 512).rows
    }
    assert table["plain+compiled"]["step"] == "1.25x"
    assert table["merging-0.5"]["step"] == "2.00x"
    assert table["merging-0.5"]["to compiled"] == "1.60x"  # 2.00 / 1.25
    assert table["merging-0.5"]["s/picture"] == "1.20"  # 2 x 0.2 + 8 x 0.1
    assert table["merging-0.5"]["picture"] == "1.67x"  # 2 / 1.2
    assert table["balanced"]["s/picture"] == "0.20"
    assert table["balanced"]["steps"] == "2/10"
    assert table["plain"]["peak GiB"] == "3.0"
