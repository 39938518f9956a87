"""Distances per computed step: the peers written here against loops written out, and what the bench keeps."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import flux_call, make_flux
from textless import flux

from accel.errors import ConfigError
from accel.evaluation import suites
from accel.evaluation.bench import distance, lineup, spectrum
from accel.evaluation.bench.distance import Plan, measure, report, tables
from accel.evaluation.bench.solvers import Solver
from accel.evaluation.bench.spectrum import Spectrum
from accel.evaluation.errors import EvaluationError
from accel.evaluation.metrics.pixel import psnr
from accel.generation import Settings

# numpy 2 on torch tensors, inside the schedulers' set_timesteps
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn:DeprecationWarning")


def latents(pipe, item=None, **options):
    call = flux_call(**{"steps": 8, **options})
    if item is None:
        return pipe(**call).images
    with item.attach(pipe):
        return pipe(**call).images


def test_spectrum_computes_the_steps_that_the_paper_does():
    assert spectrum.steps(24) == (0, 1, 2, 3, 4, 6, 8, 11, 15, 20)
    assert spectrum.steps(50) == (0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38, 46)


def test_its_forecast_is_half_ridge_half_newton():
    """The ridge solution as least squares with more rows, the polynomials as cosines."""
    at, now = [0.1, -0.4, -0.6, -1.0], 0.35
    values = np.random.default_rng(0).normal(size=(4, 7))
    basis = np.stack([np.cos(m * np.arccos(at)) for m in range(5)], axis=1)
    rows = np.concatenate([basis, np.sqrt(0.1) * np.eye(5)])
    fitted, *_ = np.linalg.lstsq(rows, np.concatenate([values, np.zeros((5, 7))]), rcond=None)
    ridge = np.array([np.cos(m * np.arccos(now)) for m in range(5)]) @ fitted
    newton = values[0] + (values[0] - values[1]) * (now - at[0]) / (at[0] - at[1])
    np.testing.assert_allclose(np.array(spectrum.weights(at, now)) @ values, (ridge + newton) / 2, rtol=1e-9)


@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_spectrum_follows_a_loop_written_out(hidden, guidance):
    """Every step computed, and what the forecast is of replaced at the steps that it leaves out."""
    pipe, computed = make_flux(), (0, 1, 2, 4, 6)
    calls, kept, made = 2 if guidance > 1 else 1, [], []
    taus = [2 * i / 7 - 1 for i in range(8)]

    def replaced(value):
        step, call = len(made) // calls, len(made) % calls
        if step not in computed:
            known = [i for i in computed if i < step][::-1]
            mix = spectrum.weights([taus[i] for i in known], taus[step])
            value = sum(w * made[i * calls + call] for w, i in zip(mix, known, strict=True))
        made.append(value)
        return value

    if hidden:
        hook = pipe.transformer.norm_out.register_forward_pre_hook(
            lambda m, args: (replaced(args[0]), *args[1:])
        )
    else:
        hook = pipe.transformer.register_forward_hook(lambda m, args, output: (replaced(output[0]),))
    expected = latents(pipe, guidance=guidance)
    hook.remove()
    plain = latents(pipe, guidance=guidance)
    count = pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *_: kept.append(1))
    got = latents(pipe, Spectrum("s", hidden=hidden, computed=computed), guidance=guidance)
    count.remove()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert (got - plain).norm() > 1e-2 * plain.norm()  # the control
    assert len(kept) == len(computed) * calls
    assert torch.equal(latents(pipe, guidance=guidance), plain)
    corrected = latents(pipe, Spectrum("s", computed=computed, correct=True), guidance=guidance)
    assert not torch.equal(corrected, got)


def test_euler_on_all_points_is_the_plain_pipeline():
    pipe = make_flux()
    plain = latents(pipe)
    assert torch.equal(latents(pipe, Solver("e", rule="euler", points=tuple(range(8)))), plain)
    assert not torch.equal(latents(pipe, Solver("e", rule="euler", points=(0, 1, 2, 5))), plain)
    assert torch.equal(latents(pipe), plain)


@pytest.mark.parametrize("rule", ["euler", "dpm++2m", "unipc"])
def test_a_solver_is_asked_at_its_points_of_the_plain_schedule(rule):
    pipe, asked = make_flux(), []
    watch = pipe.transformer.register_forward_pre_hook(
        lambda m, args, kwargs: asked.append(kwargs["timestep"][0].item()), with_kwargs=True
    )
    latents(pipe)
    plain = list(asked)
    asked.clear()
    latents(pipe, Solver("s", rule=rule, points=(0, 1, 2, 5, 7)))
    watch.remove()
    assert asked == pytest.approx([plain[i] for i in (0, 1, 2, 5, 7)], rel=1e-6)


def test_dpm_solver_is_the_paper_s():
    """2M written out for flow matching: the noise level s, the signal 1 - s, half-logarithms of their ratio."""
    pipe, points, seen = make_flux(), (0, 1, 3, 4, 6), []
    levels = []

    def look(module, args, kwargs, output):
        seen.append((kwargs["hidden_states"].double(), output[0].double()))
        levels.append(kwargs["timestep"][0].item())

    hook = pipe.transformer.register_forward_hook(look, with_kwargs=True)
    got = latents(pipe, Solver("s", rule="dpm++2m", points=points))
    hook.remove()
    s = [min(level, 1 - 1e-4) for level in levels] + [0.0]
    ratio = [np.log((1 - v) / v) if v else np.inf for v in s]
    x, before = seen[0][0], None
    for i in range(len(points)):
        data = x - s[i] * seen[i][1]
        h = ratio[i + 1] - ratio[i]
        mixed = data
        if before is not None and np.isfinite(h):
            r = (ratio[i] - ratio[i - 1]) / h
            mixed = (1 + 1 / (2 * r)) * data - 1 / (2 * r) * before
        x = s[i + 1] / s[i] * x - (1 - s[i + 1]) * np.expm1(-h) * mixed
        before = data
    torch.testing.assert_close(got.double(), x, rtol=1e-3, atol=1e-3)


PROMPTS = suites.take(suites.scenes(seed=3).prompts, 4)
ONLY = distance.re.compile("^(fast|spectrum-hidden|euler-fast|steps=|dbcache-dmd-fast)$|steps=")


def plan(**changes):
    return Plan(Settings(), batch=2, **{"seed": 5, "fine": 20, **changes})


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distances")
    return folder, measure(folder, flux(), PROMPTS, [12], plan(), ONLY)


def test_rows_say_what_was_computed_and_how_far_off_it_is(rows):
    _, found = rows
    by_name = {row["name"]: row for row in found}
    fast = next(s.item for s in lineup.settings(12) if s.item.name == "fast")
    computed = lineup._computed(fast.method, 12)
    assert by_name["plain"]["computed"] == 12
    assert by_name["fast"]["computed"] == by_name["euler-fast"]["computed"] == len(computed)
    assert by_name["spectrum-hidden"]["computed"] == len(spectrum.steps(12))
    assert by_name[f"steps={len(computed)}"]["computed"] == len(computed)
    assert all(5 < min(row["psnr"]) < 100 for row in found if row["psnr"])
    assert {len(row["fine"]) for row in found if row["fine"]} == {4}
    assert "not installed" in by_name["dbcache-dmd-fast"]["why"] or by_name["dbcache-dmd-fast"]["psnr"]


def test_tables_compare_at_equal_steps(rows):
    folder, found = rows
    page = report(folder, found, "tiny").read_text()
    every, against = tables(found)
    assert "`fast`" in page
    assert [row[0] for row in every.rows][-1] == "`plain`"
    own = [row for row in against.rows if row[0] == "`fast`"]
    assert {row[2] for row in own} <= {"peers", "fewer steps"}
    best = max(
        (r for r in found if r["group"] == "fewer steps" and r["psnr"]), key=lambda r: np.mean(r["psnr"])
    )
    gain = np.mean(next(r for r in found if r["name"] == "fast")["psnr"]) - np.mean(best["psnr"])
    assert own[-1][3] == f"`{best['name']}`"
    assert own[-1][5].startswith(f"{gain:+.1f}")
    assert json.loads((folder / "distances.json").read_text())["environment"]


def test_a_stopped_comparison_goes_on_and_another_is_refused(rows, tmp_path, monkeypatch):
    folder, found = rows
    pipe, calls = flux(), []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    assert measure(folder, pipe, PROMPTS, [12], plan(), ONLY) == found
    assert not calls
    with pytest.raises(EvaluationError, match="made with another call or other prompts"):
        measure(folder, pipe, PROMPTS, [12], plan(seed=6), ONLY)
    with torch.no_grad():
        other = flux()
        other.transformer.x_embedder.weight.neg_()
    with pytest.raises(EvaluationError, match="or another model"):
        measure(folder, other, PROMPTS, [12], plan(), ONLY)
    with pytest.raises(ConfigError, match="--only 'zzz' matches none of the settings"):
        measure(folder, pipe, PROMPTS, [12], plan(), distance.re.compile("zzz"))
    short = measure(tmp_path, pipe, PROMPTS, [12], plan(minutes=0.0), ONLY)
    assert [row["name"] for row in short] == ["plain"]
    ran, run = [], distance._pictures
    monkeypatch.setattr(
        distance, "_pictures", lambda pipe, item, *rest: ran.append(item.name) or run(pipe, item, *rest)
    )
    (_, fast) = measure(tmp_path, pipe, PROMPTS, [12], plan(), distance.re.compile("^fast$"))
    assert ran == ["fast"]  # nothing plain is run again
    assert fast["psnr"] == next(row for row in found if row["name"] == "fast")["psnr"]


def test_a_fine_run_can_be_left_out(rows, tmp_path):
    found = measure(tmp_path, flux(), PROMPTS, [12], plan(fine=0), distance.re.compile("^fast$"))
    with_one = {row["name"]: row for row in rows[1]}
    assert [row["name"] for row in found] == ["plain", "fast"]
    assert [row["fine"] for row in found] == [None, None]
    assert found[1]["psnr"] == with_one["fast"]["psnr"]
    every, *_ = tables(found)
    assert "to a fine run" not in every.header
    assert [len(row) for row in every.rows] == [len(every.header)] * 2
    assert [folder.name for folder in (tmp_path / "plain").glob("*/*")] == ["12"]
    with pytest.raises(EvaluationError, match="choose another folder"):
        measure(tmp_path, flux(), PROMPTS, [12], plan(fine=3), distance.re.compile("^fast$"))


@pytest.mark.filterwarnings("ignore:.*(cut off|unreadable):accel.errors.AccelWarning")
def test_a_line_that_was_cut_off_is_measured_again(rows, tmp_path):
    folder, found = rows
    text = (folder / "distances.jsonl").read_text().splitlines(keepends=True)
    by_name = [row["name"] for row in found]
    last = by_name.index("fast")
    whole = [line for i, line in enumerate(text) if i != last]
    (tmp_path / "distances.jsonl").write_text("".join(whole) + text[last][:200])
    measured = measure(tmp_path, flux(), PROMPTS, [12], plan(), ONLY)
    assert sorted(row["name"] for row in measured) == sorted(by_name)
    assert measured[-1]["psnr"] == pytest.approx(found[last]["psnr"], abs=0.5)
    assert len((tmp_path / "distances.jsonl").read_text().splitlines()) == len(text)


def test_where_no_projections_are_counted_the_report_says_a_dash(rows, tmp_path):
    """Ours has no computed steps then, and is compared to nobody."""
    _, found = rows
    uncounted = [{**row, "computed": 12.0 if row["name"] == "plain" else None} for row in found]
    (every,) = tables(uncounted)
    assert {row[2] for row in every.rows} == {"12.0", "–"}
    assert "| – |" in report(tmp_path, uncounted, "tiny").read_text()


def test_decibels_are_the_metric_s():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 256, (3, 3, 16, 16), generator=g, dtype=torch.uint8) for _ in range(2))
    assert distance._decibels(a, b) == pytest.approx(psnr(a, b).tolist(), abs=1e-3)
    assert distance._decibels(a, a) == [100.0] * 3


@pytest.mark.parametrize("total", [20, 24, 28, 50])
def test_the_lineup_has_a_row_of_ours_for_the_presets_before_and_spectrum(total):
    settings = lineup.settings(total)
    names = [s.item.name for s in settings]
    assert len(names) == len(set(names))
    own = {
        len(lineup._computed(s.item.method, total))
        for s in settings
        if s.group == "accel" and "before" not in s.item.name
    }
    before = {
        len(lineup._computed(s.item.method, total)) for s in settings if s.item.name.endswith("-before")
    }
    assert before | {len(spectrum.steps(total))} <= own


@pytest.mark.parametrize("total", [20, 24, 28, 50])
def test_spectrum_is_compared_at_its_own_number_of_steps_and_at_that_of_fast(total):
    line = {s.item.name: s.item for s in lineup.settings(total)}
    fast = len(lineup._computed(line["fast"].method, total))
    own = spectrum.steps(total)
    for place in ("hidden", "output"):
        assert line[f"spectrum-{place}"].computed == own
        as_many = line.get(f"spectrum-{place}-{fast}", line[f"spectrum-{place}"]).computed
        assert len(as_many) == fast
        assert as_many[:5] == own[:5]  # its warm-up stays
    assert fast == len(own) or line[f"spectrum-hidden-{fast}"].hidden
