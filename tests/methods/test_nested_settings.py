"""Configurations of parts: what is short for what, what is refused, and that they copy, compare, hash, pickle and go into a file."""

import dataclasses
import json
import pickle

import pytest
import yaml

import accel
from accel import configs, methods
from accel.core.schedule import Schedule, Scheduled
from accel.errors import ConfigError, UnknownNameError
from accel.evaluation.configurations import parse
from accel.evaluation.errors import EvaluationError
from accel.methods.merging import Matching
from accel.methods.pruning import Selection

CLASSES = [cls for cls in methods.TABLE if issubclass(cls, Scheduled)]
WHOLE = {
    accel.ForecastConfig: accel.ForecastConfig(schedule=Schedule(steps=(0, 1, 4), total=6), trend=0.5),
    accel.TokenMergingConfig: accel.TokenMergingConfig.tomesd(0.4),
    accel.TokenPruningConfig: accel.TokenPruningConfig.cat(0.4),
    accel.DynamicChunkingConfig: accel.DynamicChunkingConfig(depth=(0.5, 1.5), dense_steps_last=2),
}
#: Every key that was one of the class's own before, and is in a part of it now.
MOVED = {
    accel.ForecastConfig: {
        "schedule": "late_cycle late_from growth tail steps total guidance_every",
    },
    accel.TokenMergingConfig: {
        "schedule": "refresh_every refresh_at",
        "matching": "threshold protect importance destinations cell merge seed",
    },
    accel.TokenPruningConfig: {
        "schedule": "late_cycle late_from refresh_every guidance_every",
        "selection": "score clusters clustering fresh_share max_age",
    },
}
OLD = [(c, part, key) for c, parts in MOVED.items() for part, keys in parts.items() for key in keys.split()]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_short_forms_are_a_schedule(cls):
    short, long = {"dense_steps_first": 3, "dense_steps_last": 2}, {"dense_first": 3, "dense_last": 2}
    if "cycle" in cls.TAKES:
        short, long = {**short, "cycle": [0, 1]}, {**long, "cycle": [0, 1]}
    config = cls(**short)
    assert config == cls(schedule=Schedule(**long)) == cls(schedule=long)
    assert (config.schedule.dense_first, config.schedule.dense_last) == (3, 2)
    assert [phase.budget for phase in config.full_schedule.phases(9)][-2:] == [1, 1]
    assert not {*short} & {*vars(config)}  # no copy that could differ
    name = methods.name_of(config)
    assert configs.load({"method": name, **short}) == configs.load({"method": name, "schedule": long})
    for key, value in short.items():
        with pytest.raises(
            ConfigError, match=rf"{cls.__name__} has a schedule, and beside it .* belongs there"
        ):
            cls(schedule=Schedule(dense_first=3), **{key: value})


@pytest.mark.parametrize(("cls", "config"), WHOLE.items(), ids=lambda c: getattr(c, "__name__", ""))
def test_they_copy_compare_hash_pickle_and_go_into_a_file(cls, config, tmp_path):
    assert config != cls()
    again = [
        dataclasses.replace(config),
        dataclasses.replace(cls(), **{f.name: getattr(config, f.name) for f in dataclasses.fields(config)}),
        pickle.loads(pickle.dumps(config)),
        eval(
            repr(config),
            {**vars(accel), **{c.__name__: c for c in (Schedule, Matching, Selection, *CLASSES)}},
        ),
    ]
    assert again == [config] * len(again)
    assert {hash(other) for other in again} == {hash(config)}
    file, plain = tmp_path / "mine.yaml", json.loads(json.dumps(dataclasses.asdict(config)))
    file.write_text(yaml.safe_dump({"method": methods.name_of(config), **plain}))
    assert configs.load(str(file)) == config


def test_a_copy_with_another_share_follows_it():
    """The cycle that the schedule leaves to ratio and budget is not frozen in it."""
    for config, name in (
        (accel.TokenMergingConfig(ratio=0.5), "ratio"),
        (accel.TokenPruningConfig(), "budget"),
    ):
        other = dataclasses.replace(config, **{name: 0.3})
        assert other.full_schedule == type(config)(**{name: 0.3}).full_schedule != config.full_schedule
    changed = dataclasses.replace(accel.ForecastConfig(cycle=(0, 1)), schedule=Schedule(growth=0.4))
    assert changed == accel.ForecastConfig(schedule=Schedule(growth=0.4))


@pytest.mark.parametrize(("cls", "part", "key"), OLD, ids=lambda x: getattr(x, "__name__", x))
def test_keys_of_before_name_their_new_place(cls, part, key, tmp_path):
    inner = {"schedule": "Schedule", "matching": "Matching", "selection": "Selection"}[part]
    message = rf"{cls.__name__} has no {key} of its own: write {part}={inner}\({key}=\.\.\.\).*{part}: {{{key}: .*{part}\.{key}="
    with pytest.raises(ConfigError, match=message):
        cls(**{key: 1})
    file, method = tmp_path / "old.yaml", methods.name_of(cls())
    file.write_text(f"method: {method}\n{key}: 1\n")
    with pytest.raises(ConfigError, match=rf"old\.yaml: {message}"):
        configs.load(str(file))
    file.write_text(f"method: {method}\n")
    if key != "steps":  # that is the run's after -c
        with pytest.raises(EvaluationError, match=rf"old\.yaml,{key}=1.*{message}"):
            parse(f"{file},{key}=1")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: accel.ForecastConfig(ordr=1), "setting of ForecastConfig 'ordr'. Did you mean 'order'"),
        (lambda: accel.ForecastConfig(growht=1), "ForecastConfig 'growht'.*there is schedule.growth"),
        (lambda: accel.TokenPruningConfig(max_aeg=1), "there is selection.max_age"),
        (lambda: accel.SpeculativeDecodingConfig(windw=1), "Did you mean 'window'"),
        (lambda: Schedule(late_form=1), "setting of Schedule 'late_form'. Did you mean 'late_from'"),
        (
            lambda: configs.load({"method": "forecast", "schedule": {"gowth": 1}}),
            "Schedule in mapping: 'gowth'",
        ),
        (lambda: configs.change(accel.TokenMergingConfig(), {"matchin.cell": 2}), "Did you mean 'matching'"),
        (lambda: configs.change(accel.TokenMergingConfig(), {"matching.cel": 2}), "Did you mean 'cell'"),
        (lambda: configs.change(accel.TokenMergingConfig(), {"ratio.cell": 2}), "'ratio.cell'"),
    ],
)
def test_misspelt_keys_get_the_nearest_name(make, message):
    with pytest.raises(UnknownNameError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule(late_from=2), r"schedule.late_from must be in \(0, 1\), got 2"),
        (lambda: Matching(cell=1), "matching.cell must be a whole number >= 2"),
        (lambda: Selection(max_age=0), "selection.max_age must be a whole number >= 1"),
        (lambda: accel.ForecastConfig(schedule=3), "schedule must be a Schedule, got 3"),
        (
            lambda: accel.ForecastConfig(schedule=Schedule(refresh_every=2)),
            "refresh_every=2 has no effect: a Fore",
        ),
        (lambda: accel.DynamicChunkingConfig(cycle=(0.5,)), r"schedule.cycle=\(0.5,\) has no effect"),
        (
            lambda: accel.TokenMergingConfig(schedule=Schedule(growth=0.3)),
            "schedule.growth=0.3 has no effect",
        ),
        (
            lambda: accel.TokenMergingConfig(groups="windows", matching=Matching(seed=1)),
            "matching=.*no effect",
        ),
    ],
)
def test_what_a_part_must_not_hold_is_named_with_its_path(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_dotted_keys_change_a_preset():
    few = configs.load("few-step")
    assert parse("few-step,schedule.dense_last=1").method == parse("few-step,dense_steps_last=1").method
    assert parse("few-step,cycle=[0.5]").method.schedule == dataclasses.replace(
        few.schedule, cycle=(0.5,), late_cycle=None
    )
    changed = parse("tomesd,ratio=0.3,matching.seed=4,matching.merge=pick,schedule.refresh_at=[2,3]").method
    assert changed.matching == Matching(protect=0, cell=2, seed=4, merge="pick")
    assert (changed.ratio, changed.schedule.refresh_at, changed.schedule.dense_first) == (0.3, (2, 3), 0)
    assert parse("few-step,schedule.dense_last=1").method.schedule == dataclasses.replace(
        few.schedule, dense_last=1
    )
    whole = parse("balanced,schedule={growth: 0.5}").method
    assert whole == dataclasses.replace(configs.load("balanced"), schedule=Schedule(growth=0.5))


@pytest.mark.parametrize(
    ("spec", "schedule"),
    [
        ("balanced,schedule.growth=null,schedule.cycle=[0,1]", Schedule(cycle=(0, 1))),
        ("balanced,cycle=[0,1]", Schedule(cycle=(0, 1))),
        ("balanced,schedule.steps=[0,1,2,5],schedule.total=10", Schedule(steps=(0, 1, 2, 5), total=10)),
        ("quality,schedule.growth=0.4", Schedule(growth=0.4)),
        ("tomesd,schedule.refresh_at=[2,3]", Schedule(dense_first=0, dense_last=0, refresh_at=(2, 3))),
        (
            "quality,schedule={cycle: [0, 1], late_cycle: [0, 0, 1]}",
            Schedule(cycle=(0, 1), late_cycle=(0, 0, 1)),
        ),
    ],
)
def test_another_source_takes_the_place_of_the_preset_s(spec, schedule):
    method = parse(spec).method
    assert method == dataclasses.replace(method, schedule=schedule)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("schedule.late_from=0.3", "schedule.late_cycle=[0,0,1]"),
        ("schedule.dense_first=3", "cycle=[0,1]"),
        ("schedule.growth=0.4", "schedule.tail=0.6"),
    ],
)
def test_the_order_of_keys_says_nothing(first, second):
    assert parse(f"quality,{first},{second}").method == parse(f"quality,{second},{first}").method


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "quality,cycle=[0,1],schedule.cycle=[0,0,1]",
            "schedule.cycle is given twice, once as schedule.cycle",
        ),
        (
            "quality,schedule={cycle: [0]},schedule.dense_last=1",
            "schedule is given as a whole and schedule.dense_last",
        ),
        ("merging,schedule.refresh_at=[5],schedule.refresh_every=1", "both say when to refresh"),
        ("few-step,ratio=0.6", r"ratio=0.6 has no effect: schedule.cycle=\(0.7,\) says the shares"),
        ("merging,cycle=[0.6],ratio=0.3", r"ratio=0.3 has no effect: schedule.cycle=\(0.6,\)"),
    ],
)
def test_what_contradicts_itself_is_refused(spec, message):
    with pytest.raises(EvaluationError, match=message):
        parse(spec)


def test_settings_are_given_by_name_each_once():
    for wrong in (
        lambda: Schedule((0, 1), cycle=(1, 0)),
        lambda: Schedule(*range(20)),
        lambda: Matching(0.9),
        lambda: accel.TokenMergingConfig(0.3),
    ):
        with pytest.raises(TypeError, match="by name, each once"):
            wrong()


def test_an_unknown_name_comes_out_of_a_worker():
    with pytest.raises(UnknownNameError) as caught:
        configs.load("balancd")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_subclass_with_a_setting_more():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(accel.ForecastConfig):
        note: str = ""

    mine = Mine(note="x", schedule=Schedule(growth=0.4))
    assert mine.full_schedule == accel.ForecastConfig(schedule=Schedule(growth=0.4)).full_schedule
