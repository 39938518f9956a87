"""Tuning, end to end: what is written does what it says, what was measured is not measured again, and what cannot be
is refused before anything is written."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from textless import flux, pixart

import accel
from accel import configs
from accel.cli.app import main
from accel.core import made_for
from accel.errors import AccelError, AccelWarning, ConfigError, UnsupportedError
from accel.evaluation.errors import EvaluationError
from accel.evaluation.metrics.lpips import LPIPS
from accel.evaluation.metrics.pixel import psnr
from accel.evaluation.tune import result
from accel.evaluation.tune.measure import Runs, amplification, config_of, cost, probes, schedule_of, watching
from accel.evaluation.tune.tune import HELD, Goal, Settings, name_of, tune
from accel.generation import Job, run
from accel.generation import Settings as Call

PROMPTS = tuple(f"prompt number {i}" for i in range(6))
STEPS = 12


def settings(**changes):
    return Settings(**{"call": Call(steps=STEPS), "prompts": PROMPTS, "minutes": 0.0, "batch": 3, **changes})


def counted(pipe):
    calls = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """One run on the FLUX-shaped model, for the tests that look at what it left."""
    folder, pipe = tmp_path_factory.mktemp("tune"), flux()
    plain = run(pipe, [Job("x", 7)], Call(steps=STEPS))
    seen = []
    made = tune(pipe, Goal("speedup", 2.0), settings(also=(12, 18)), folder / "mine.tune", seen.append)
    assert torch.equal(run(pipe, [Job("x", 7)], Call(steps=STEPS)), plain)  # the pipeline is as it was
    result.page(made, folder / "mine.tune")
    result.write(made, folder / "mine.yaml", "accel tune")
    return folder, made, seen


def test_the_preset_gives_what_was_measured_on_prompts_that_were_held_back(tuned):
    folder, made, _ = tuned
    assert len(made.mask.steps) == STEPS // 2
    row = next(r for r in made.rows if r.split == HELD)
    pipe, jobs = flux(), [Job(PROMPTS[i], i) for i in (4, 5)]
    plain = run(pipe, jobs, Call(steps=STEPS))
    with accel.accelerate(pipe, folder / "mine.yaml") as handle:
        fast = run(pipe, jobs, Call(steps=STEPS))
    assert [i for i, s in enumerate(handle.stats.steps) if s.computed] == list(made.mask.steps)
    quantised = [(pictures * 255).round().byte() for pictures in (fast, plain)]
    assert psnr(*quantised).tolist() == pytest.approx(row.values["psnr"], rel=1e-5)
    assert min(row.values["psnr"]) < 99  # not just the plain pictures


def test_the_page_names_what_ships_at_as_many_steps(tuned):
    folder, made, _ = tuned
    page = (folder / "mine.tune" / "report.md").read_text()
    other = next(r for r in made.rows if r.split == HELD and r.name[0].isalpha())
    assert other.computed == STEPS // 2
    assert other.name in page
    assert "<svg" in (folder / "mine.tune" / "frontier.svg").read_text()
    side_car = json.loads((folder / "mine.json").read_text())
    assert side_car["masks"]["12"]["steps"] == list(range(12))
    assert len(side_car["grams"]) == 4
    assert (folder / "mine.yaml").read_text().count("\n") == 9 + (made.mask.trend != 1)


def test_other_numbers_of_steps_get_masks_of_no_higher_price(tuned):
    folder, made, _ = tuned
    same, longer = made.others[12], made.others[18]
    assert len(same.steps) <= len(made.mask.steps)
    assert max(same.price, longer.price) <= made.mask.price
    assert len(longer.steps) < 18
    pipe = flux()
    with accel.accelerate(pipe, folder / "mine-18.yaml") as handle:
        run(pipe, [Job("x", 7)], Call(steps=18))
    assert [i for i, s in enumerate(handle.stats.steps) if s.computed] == list(longer.steps)
    assert "not run" in (folder / "mine-18.yaml").read_text()


def test_when_steps_are_is_known_without_a_call_of_the_model():
    pipe, job = flux(), Job("a", 1)
    calls = counted(pipe)
    times, lengths = schedule_of(Runs(pipe, Call(steps=STEPS), batch=1), 9, job)
    assert not calls
    ((_, seen),) = Runs(pipe, Call(steps=9), batch=1).watched([job])
    assert times.tolist() == seen.times_N.tolist()
    assert lengths.tolist() == seen.lengths_N.tolist()


def test_progress_goes_up_to_its_end(tuned):
    _, _, seen = tuned
    done = [state[0] for state in seen]
    assert done == sorted(done)
    assert all(d <= total + 1e-6 for d, total, _ in seen)
    assert {text.split(",")[0] for _, _, text in seen} >= {"plain", "what a gap does", "6 of 12 steps"}


def test_a_stopped_run_goes_on_without_measuring_again(tmp_path):
    pipe = flux()
    calls, stopped = counted(pipe), []

    def stop(state):
        if state[2].startswith("what a gap does, 2") and not stopped:
            stopped.append(len(calls))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(pipe, Goal("speedup", 3.0), settings(), tmp_path, stop)
    first = len(calls)
    tune(pipe, Goal("speedup", 3.0), settings(), tmp_path)
    whole = flux()
    once = counted(whole)
    tune(whole, Goal("speedup", 3.0), settings(), tmp_path / "other")
    # Two calls of a checked pipeline for the guidance; no plain run of the search and no gap twice.
    assert len(calls) == len(once)
    assert 0 < first < len(once)
    again = len(calls)
    tuned = tune(pipe, Goal("speedup", 3.0), settings(), tmp_path)
    assert len(calls) == again
    assert len(tuned.mask.steps) == 4


def test_pictures_that_no_seconds_were_kept_of_are_made_again(tuned, tmp_path):
    folder, made, _ = tuned
    shutil.copytree(folder / "mine.tune", tmp_path / "mine.tune")
    file = tmp_path / "mine.tune" / "state.json"
    state = json.loads(file.read_text())
    del state["seconds"][HELD]
    file.write_text(json.dumps(state))
    again = tune(flux(), Goal("speedup", 2.0), settings(), tmp_path / "mine.tune")
    assert again.mask == made.mask
    assert again.seconds["call"] > 0


@pytest.mark.parametrize("make", [flux, pixart])
def test_the_fastest_that_keeps_the_budget(make, tmp_path):
    pipe = make()
    loose = tune(pipe, Goal("speedup", 2.0), settings(), tmp_path)
    at_six = [r for r in loose.rows if r.split == "search" and r.computed == 6]
    wanted = max(Goal("psnr", 1.0).closeness(r.values["psnr"]) for r in at_six) - 0.01
    everywhere = min(min(r.values["psnr"]) for r in loose.rows if r.computed <= 6) - 1

    def check(goal):
        made = tune(pipe, goal, settings(), tmp_path)
        assert len(made.mask.steps) <= 6 + 3
        held = [r.values["psnr"] for r in made.rows if r.split == HELD and r.name[0].isdecimal()]
        assert goal.is_met(held[-1])
        assert not any(goal.is_met(values) for values in held[:-1])

    check(Goal("psnr", everywhere))
    # Six steps keep it on the search. On the other prompts six, or some more, do as well; or none, and it says so.
    with suppress(EvaluationError):
        check(Goal("psnr", wanted))
    with pytest.raises(
        EvaluationError, match=r"keeps at least 99\.5 dB .* the best found computes \d+ of 12 steps"
    ):
        tune(pipe, Goal("psnr", 99.5), settings(), tmp_path)


def test_what_the_sampler_was_given_adds_up_to_what_it_made():
    pipe, jobs = flux(), [Job("a", 1), Job("b", 2)]
    runs = Runs(pipe, Call(steps=STEPS), batch=2)
    ((_, seen),) = runs.watched(jobs)
    assert seen.known
    starts = torch.cat(
        [torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(j.seed)) for j in jobs]
    )
    packed = pipe._pack_latents(starts, 2, 4, 16, 24)
    ends = pipe(
        [j.prompt for j in jobs],
        num_inference_steps=STEPS,
        output_type="latent",
        generator=[torch.Generator().manual_seed(j.seed) for j in jobs],
    ).images
    torch.testing.assert_close(seen.ends_PL, (ends - packed).flatten(1), rtol=1e-3, atol=1e-4)


def test_amplification_is_the_end_over_the_forecast():
    """Of a model that does not look at its input, the end is off by what the forecast was. One that does, by more."""
    jobs, gap = [Job("a", 1), Job("b", 2)], probes(STEPS)[2]
    found = {}
    for blind in (True, False):
        pipe = flux()
        if blind:
            pipe.transformer.x_embedder.weight.data.zero_()
        runs = Runs(pipe, Call(steps=STEPS), batch=2)
        ((_, seen),) = runs.watched(jobs)
        found[blind] = amplification(runs, jobs, seen.plain(), seen.ends_PL, gap)[1]
    assert found[True] == pytest.approx(1, abs=1e-3)
    assert abs(found[False] - 1) > 0.01


def test_a_watched_pipeline_is_left_as_it_was():
    pipe = flux()
    before = set(vars(pipe.scheduler))
    with watching(pipe):
        assert "step" in vars(pipe.scheduler)
    assert set(vars(pipe.scheduler)) <= before


def arguments_for(make, folder, *more, prompts=5):
    """Of the command, on a pipeline of textless.py."""
    file = folder / "prompts.txt"
    file.write_text("\n".join(PROMPTS[:prompts]))
    model = f"{__file__.replace('test_tune', 'textless')}:{make.__name__}"
    return ["tune", model, "--prompts", str(file), "--minutes", "0", "--out", str(folder / "p.yaml"), *more]


def code_of(arguments):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return end.value.code


def test_a_budget_of_lpips_is_kept_on_the_preset_s_own_pictures(tmp_path, monkeypatch):
    """By a network of random weights: what it says means nothing, but it says the same of the same pictures."""
    torch.manual_seed(0)
    model = LPIPS()
    for head in model.heads:
        head.copy_(torch.rand(head.shape))
    monkeypatch.setattr(LPIPS, "load", lambda *_: model)
    found = {}
    for budget in (1e3, 0.2):
        arguments = arguments_for(flux, tmp_path, "--steps", "10", "--force", "--lpips", "alexnet.pth")
        assert code_of([*arguments, "--max-lpips", str(budget)]) == 0
        pipe, job = flux(), [Job(PROMPTS[4], 4)]
        plain = run(pipe, job, Call(steps=10))
        with accel.accelerate(pipe, tmp_path / "p.yaml") as handle:
            fast = run(pipe, job, Call(steps=10))
        distance = float(model((fast * 255).round().byte(), (plain * 255).round().byte()))
        found[budget] = distance, sum(step.computed > 0 for step in handle.stats.steps)
        assert distance <= budget
    assert found[1e3][1] < found[0.2][1]
    assert found[1e3][0] > 0.2


def test_an_lpips_that_cannot_be_told_is_no_distance_of_nothing(tmp_path):
    def scorer(images, plain, prompts):
        return [{"value": None, "reason": "not a number"} for _ in images]

    with pytest.raises(EvaluationError, match="LPIPS cannot be told: not a number"):
        tune(flux(), Goal("lpips", 0.05), settings(lpips=scorer), tmp_path)


@pytest.mark.parametrize("budget", [1.5, 2.5])
def test_few_steps_may_be_computed_on_a_part_of_their_tokens(budget, tmp_path):
    """The mask that was closest of all that are as fast, whichever kind it is of; and a preset that does just that."""
    pipe, call = flux(), Call(steps=8)
    made = tune(pipe, Goal("speedup", budget), settings(call=call), tmp_path / "p.tune")
    searched = [row for row in made.rows if row.split == "search"]
    assert {"few-step", "few-step-fast"} <= {row.name.split()[-1] for row in searched}
    closest = max(searched, key=lambda r: made.goal.closeness(r.values["psnr"]) + np.median(r.values["psnr"]))
    assert closest.name == name_of(made.mask)
    assert all(row.computed <= 8 / budget + 1e-6 for row in searched)
    thin = replace(made.mask, thin="few-step", steps=tuple(range(8)))
    made.mask, made.others = thin, {6: replace(thin, steps=(0, 1, 3, 5))}
    made.rows.append(replace(searched[0], name=name_of(thin), computed=cost(thin, 8), split=HELD))
    result.write(made, tmp_path / "p.yaml", "accel tune")
    for file, mask, total in (("p.yaml", thin, 8), ("p-6.yaml", made.others[6], 6)):
        config = configs.load(tmp_path / file)
        assert replace(config, made_for=None) == config_of(mask, total)
        budgets = [phase.budget for phase in config.schedule.phases(total)]
        assert config.schedule.late_cycle is None
        half = total // 2
        shares = [1.0, *[0.7] * (half - 1), *[0.4] * half]
        assert budgets == [share * (step in mask.steps) for step, share in enumerate(shares)]
        assert cost(mask, total) == pytest.approx(sum(budgets))
        accel.accelerate(flux(), config).remove()
        with pytest.raises(UnsupportedError, match="the model is FluxTransformer2DModel there"):
            accel.accelerate(pixart(), config)


def test_what_ships_is_measured_again_where_it_is_not_what_it_was(tuned, tmp_path, monkeypatch):
    folder, made, _ = tuned
    shutil.copytree(folder / "mine.tune", tmp_path / "mine.tune")
    before = made.rows[-1]
    other = accel.ForecastConfig(schedule=accel.Schedule(steps=(0, 1, 2, 3, 4, 5)), correct="auto")
    pipe = flux()
    calls = counted(pipe)
    same = tune(pipe, Goal("speedup", 2.0), settings(), tmp_path / "mine.tune")
    assert (same.rows[-1], calls) == (before, [])
    monkeypatch.setattr("accel.evaluation.tune.tune.shipped", lambda *_: (before.name, other))
    changed = tune(pipe, Goal("speedup", 2.0), settings(), tmp_path / "mine.tune")
    assert calls
    assert (changed.rows[-1].name, changed.rows[-1].computed) == (before.name, 6)
    assert changed.rows[-1].values != before.values


# What is refused.


@pytest.mark.parametrize(
    ("goal", "changes", "why"),
    [
        (Goal("psnr", 30.0), {"prompts": PROMPTS[:3]}, "3 prompts: tuning takes at least 4"),
        (Goal("psnr", 30.0), {"prompts": ("same",) * 9}, "1 prompts: tuning takes at least 4"),
        (Goal("psnr", 30.0), {"call": Call(steps=3)}, "3 steps leave none to forecast"),
        (Goal("speedup", 13.0), {}, "a speedup of 13 cannot be"),
        (Goal("speedup", 1.0), {}, "a speedup of 1 cannot be"),
    ],
)
def test_what_cannot_be_asked_for(goal, changes, why, tmp_path):
    with pytest.raises(ConfigError, match=why):
        tune(flux(), goal, settings(**changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_budget_that_nothing_meets_says_the_best_found(tmp_path, capsys):
    arguments = arguments_for(flux, tmp_path, "--min-psnr", "99.5", "--steps", "6", "--also", "8", prompts=4)
    assert code_of(arguments) == 2
    error = capsys.readouterr().err
    assert "keeps at least 99.5 dB" in error
    assert "the best found" in error
    assert not [*tmp_path.glob("p*.yaml"), *tmp_path.glob("p.json")]


def test_the_command_on_a_random_pixart_runs_to_its_end(tmp_path):
    assert code_of(arguments_for(pixart, tmp_path, "--speedup", "2", "--steps", "10")) == 0
    with accel.accelerate(pixart(), tmp_path / "p.yaml") as handle:
        assert len(handle.config.schedule.steps) == 5


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn:DeprecationWarning")
def test_a_sampler_that_adds_noise_is_refused(tmp_path):
    pipe = pixart()
    pipe.scheduler = EulerAncestralDiscreteScheduler()
    with pytest.raises(
        UnsupportedError, match=r"adds noise at every step: masks are priced by .* take a preset"
    ):
        tune(pipe, Goal("speedup", 2.0), settings(), tmp_path)
    assert not list(tmp_path.iterdir())
    with accel.accelerate(pipe, "fast") as handle:  # which does run
        run(pipe, [Job("x", 1)], Call(steps=STEPS))
    assert handle.stats.steps[6].forecast


def test_a_folder_of_another_version_or_other_settings_is_refused(tuned, tmp_path):
    folder, _, _ = tuned
    pipe = flux()
    calls = counted(pipe)
    with pytest.raises(EvaluationError, match=r"other settings: call is .*'steps': 12"):
        tune(pipe, Goal("speedup", 2.0), settings(call=Call(steps=10)), folder / "mine.tune")
    state = json.loads((folder / "mine.tune" / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps({**state, "version": 0}))
    with pytest.raises(EvaluationError, match=r"another version \(0, this is 1\)"):
        tune(pipe, Goal("speedup", 2.0), settings(), tmp_path)
    assert not calls


def test_a_side_car_for_another_pipeline_says_what_differs(tuned, tmp_path):
    folder, _, _ = tuned
    preset = folder / "mine.yaml"
    other = flux()
    with torch.no_grad():
        other.transformer.x_embedder.weight.neg_()
    with pytest.raises(UnsupportedError, match="FluxTransformer2DModel has other weights"):
        accel.accelerate(other, preset)
    moved = flux()
    moved.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with pytest.raises(UnsupportedError, match=r"the scheduler's shift is 1\.0 there, 3\.0 here"):
        accel.accelerate(moved, preset)
    with pytest.raises(
        UnsupportedError, match="the model is FluxTransformer2DModel there, PixArtTransformer2DModel here"
    ):
        accel.accelerate(pixart(), preset)
    pipe = flux()
    with accel.accelerate(pipe, preset):
        with pytest.warns(AccelWarning, match="its steps carry over by their number"):
            run(pipe, [Job("x", 1)], Call(steps=STEPS, size=(32, 32)))
        with pytest.raises(ConfigError, match="runs of 12 steps, this one has 9"):
            run(pipe, [Job("x", 1)], Call(steps=9))
    moved_file = tmp_path / "mine.yaml"
    moved_file.write_text(preset.read_text())
    with pytest.raises(ConfigError, match=r"mine\.json cannot be read"):
        accel.accelerate(flux(), moved_file)
    for content in ("{", "[]", '{"version": 0}', '{"version": 1}'):
        (tmp_path / "mine.json").write_text(content)
        with pytest.raises(ConfigError, match="run accel tune again"):
            accel.accelerate(flux(), moved_file)


def test_a_model_is_told_by_its_weights_in_any_precision():
    pipe = flux()
    first = made_for.describe(pipe.transformer, pipe.scheduler)
    for dtype in (torch.bfloat16, torch.float16):
        assert made_for.describe(flux().transformer.to(dtype), pipe.scheduler) == first
    larger = made_for.describe(pixart().transformer, pipe.scheduler)
    assert made_for.difference(first, larger)
    assert made_for.difference(first, first) is None


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "give one of --max-lpips, --min-psnr and --speedup"),
        (["--min-psnr", "30", "--speedup", "2"], "give one of"),
        (["--max-lpips", "0.05"], "needs --lpips FILE"),
        (["--min-psnr", "-3"], "--min-psnr -3 is no budget"),
        (["--speedup", "2", "--out", "mine.txt"], "a preset ends in .yaml"),
        (["some/folder", "--speedup", "2"], "--prompts FILE is missing"),
    ],
)
def test_what_the_command_line_refuses(arguments, why, capsys):
    with pytest.raises(SystemExit) as end:
        main(["tune", *arguments])
    assert end.value.code == 2
    assert why in " ".join(capsys.readouterr().err.split())
    assert issubclass(ConfigError, AccelError)
