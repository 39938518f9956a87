import copy
import gc
import itertools
import math
import pickle
import weakref

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler

from accel.core import samplers
from accel.core.clock import Clock, Listener
from accel.core.readback import Readback
from accel.core.schedule import Schedule, growing, slots
from accel.errors import ConfigError


def budgets(schedule, total):
    return [p.budget for p in schedule.phases(total)]


def refreshes(schedule, total):
    return [i for i, p in enumerate(schedule.phases(total)) if p.refresh]


def test_dense_ends_and_cycle():
    assert budgets(Schedule((0.5,), dense_first=2, dense_last=1), 6) == [1, 1, 0.5, 0.5, 0.5, 1]
    assert budgets(Schedule((1, 0, 0.25, 0), dense_first=1), 7) == [1, 1, 0, 0.25, 0, 1, 0]


def test_a_late_cycle_takes_over_at_its_share_of_the_steps():
    schedule = Schedule((0, 1), dense_first=1, dense_last=1, late_cycle=(0, 0, 0.5))
    assert budgets(schedule, 11) == [1, 0, 1, 0, 1, 0, 1, 0, 0, 0.5, 1]
    assert budgets(schedule, 10) == [1, 0, 1, 0, 1, 0, 0, 0.5, 0, 1]
    assert budgets(Schedule((0,), late_cycle=(0.5,), late_from=0.3), 10) == [0] * 3 + [0.5] * 7
    # Dense first steps that reach beyond it: it starts after them.
    assert budgets(Schedule((0,), dense_first=3, late_cycle=(0.5, 1)), 5) == [1, 1, 1, 0.5, 1]
    assert Schedule((1,), late_cycle=(0.5,)).reduces


def test_a_late_cycle_waits_until_the_running_one_is_complete():
    # Broken off before their computed step, the pairs left three forecasts in a row: steps 6, 7 and 8 here.
    schedule = Schedule((0, 1), dense_first=6, late_cycle=(0, 0, 1), late_from=0.33)
    assert budgets(schedule, 20) == [1] * 6 + [0, 1] + [0, 0, 1] * 4
    for total in range(8, 60):
        for share in (0.2, 0.33, 0.5, 0.77):
            schedule = Schedule((0, 0, 1), dense_first=2, late_cycle=(0, 0.5), late_from=share)
            middle = budgets(schedule, total)[2:]
            early = middle.index(0.5) - 1 if 0.5 in middle else len(middle)
            wanted = max(math.ceil(share * total) - 2, 0)
            assert wanted <= early <= wanted + 2 or early == len(middle)
            assert early % 3 == 0 or early == len(middle)


def computed(schedule, total):
    return [i for i, p in enumerate(schedule.phases(total)) if p.dense]


#: (steps, growth, tail) -> the masks that dynamic programming and hill-climbing found, which the rule was read off.
FOUND = {
    (24, 0.42, 0.5): [0, 1, 2, 3, 4, 6, 9, 13, 18, 22],
    (50, 0.36, 0.5): [0, 1, 2, 3, 4, 5, 7, 10, 14, 19, 26, 35, 44, 48],
}


@pytest.mark.parametrize(("total", "growth", "tail"), FOUND)
def test_growing_gaps_are_the_masks_they_were_read_off(total, growth, tail):
    schedule = Schedule(growth=growth, tail=tail)
    assert computed(schedule, total) == FOUND[total, growth, tail]
    assert schedule.reduces
    assert {p.budget for p in schedule.phases(total)} == set(schedule.budgets) == {0, 1}
    assert Schedule(growth=growth / 4, tail=tail).phases(total) != schedule.phases(total)  # the control


@pytest.mark.parametrize("total", [0, 1, 2, 7, 24, 300])
def test_growing_gaps_grow_then_shrink_for_any_number_of_steps(total):
    for growth, tail in ((0.05, 0.1), (0.42, 0.5), (3, 0.2), (0.3, 9)):
        steps = growing(total, growth, tail)
        assert list(steps) == sorted(set(steps))
        assert steps[:1] == (0,)[:total]
        for here, there in itertools.pairwise(steps):
            wanted = min(growth * here, tail * (total - here) + 1)
            assert abs(there - here - max(1, wanted)) <= 0.5
        assert all(step < total for step in steps)
        assert (
            not steps
            or steps[-1] + max(1, min(growth * steps[-1], tail * (total - steps[-1]) + 1)) >= total - 0.5
        )


def test_explicit_steps_are_computed_and_no_others():
    schedule = Schedule(steps=(0, 1, 4, 5, 9))
    assert computed(schedule, 12) == [0, 1, 4, 5, 9]
    assert computed(schedule, 10) == [0, 1, 4, 5, 9]
    with pytest.raises(ConfigError, match="at least 10 steps, this one has 9"):
        schedule.phases(9)
    made_for = Schedule(steps=(0, 1, 4), total=6)
    assert computed(made_for, 6) == [0, 1, 4]
    for other in (5, 7):
        with pytest.raises(ConfigError, match=f"of 6 steps, this one has {other}"):
            made_for.phases(other)


def test_a_branch_of_guidance_is_left_out_after_the_head_of_growing_gaps():
    phases = Schedule(growth=0.42, guidance_every=2).phases(24)
    assert [i for i, p in enumerate(phases) if not p.guided] == [6, 13, 22]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"cycle": (0, 1), "growth": 0.4}, "got cycle and growth"),
        ({"growth": 0.4, "steps": (0, 1)}, "got growth and steps"),
        ({"growth": 0.4, "dense_first": 2}, "schedule.dense_first=2 has no effect: growth says"),
        ({"growth": 0.4, "late_cycle": (0, 1)}, "Leave late_cycle out"),
        ({"growth": 0}, "growth must be a number > 0, got 0"),
        ({"growth": math.nan}, "growth must be a number > 0, got nan"),
        ({"growth": 0.4, "tail": -1}, "tail must be a number > 0, got -1"),
        ({"steps": (1, 2)}, "rise from 0"),
        ({"steps": (0, 2, 2)}, "rise from 0"),
        ({"steps": (0, 2.0)}, "rise from 0"),
        ({"steps": (0, 5), "total": 5}, "above the last of steps, got 5"),
        ({"cycle": (0, 1), "total": 5}, "schedule.total=5 has no effect: no steps is given"),
    ],
)
def test_one_thing_says_what_is_computed(bad, why):
    with pytest.raises(ConfigError, match=why):
        Schedule(**bad)


def test_a_schedule_without_a_source_is_no_whole_one():
    with pytest.raises(ConfigError, match="neither cycle, growth nor steps"):
        Schedule(dense_first=2).phases(8)
    assert Schedule(dense_first=2).over(Schedule((0, 1), 5, 1)) == Schedule((0, 1), 2, 1)
    assert Schedule(growth=0.4).over(Schedule((0, 1), 5, 1)) == Schedule(growth=0.4)


def test_refresh_points():
    assert refreshes(Schedule((0.5,), dense_first=1, refresh_every=3), 9) == [1, 4, 7]
    assert refreshes(Schedule((0.5,), dense_first=2), 9) == [2]
    # The first reduced step builds the plan even if it is not listed; a listed dense step has none to build.
    assert refreshes(Schedule((0.5,), dense_first=2, refresh_at=(0, 4, 5)), 9) == [2, 4, 5]


def test_slots_round_up_to_multiples():
    assert slots(100, 1 - 0.9) == 10  # 1 - 0.9 is 0.0999...: not 9, and not 11 for 0.1000...1
    assert slots(100, 0.5, 16) == 64
    assert slots(100, 0.99, 16) == 100


@pytest.mark.parametrize(
    "bad",
    [{"cycle": ()}, {"cycle": (1.2,)}, {"cycle": (1,), "late_cycle": ()}, {"cycle": (1,), "dense_first": -1}],
)
def test_schedule_refuses(bad):
    with pytest.raises(ConfigError):
        Schedule(**bad)


class Log(Listener):
    def __init__(self):
        self.events = []

    def begin(self, clock):
        self.events.append(("begin", clock.total))

    def before(self, clock):
        self.events.append(("before", clock.step))

    def after(self, clock):
        self.events.append(("after", clock.step, clock.samples))

    def end(self, clock):
        self.events.append(("end", clock.step))


def loop(scheduler, steps=2, begin=None):
    scheduler.set_timesteps(steps)
    if begin is not None:
        scheduler.set_begin_index(begin)
    sample = torch.zeros(3, 1, 4, 4)
    for t in scheduler.timesteps[begin or 0 :]:
        sample = scheduler.step(torch.ones_like(sample), t, sample).prev_sample


@pytest.mark.parametrize("make", [DDIMScheduler, FlowMatchEulerDiscreteScheduler])
def test_clock_follows_and_unwraps(make):
    scheduler, log = make(), Log()
    before = dict(vars(scheduler))
    undo = Clock.of(scheduler).add(log)
    loop(scheduler)
    assert log.events == [
        ("begin", 2),
        ("before", 0),
        ("after", 0, 3),
        ("before", 1),
        ("after", 1, 3),
        ("end", 2),
    ]
    undo()
    after = vars(scheduler)
    assert set(after) - set(before) <= {"num_inference_steps", "timesteps", "sigmas"}  # the loop's own
    assert "step" not in after
    loop(scheduler)
    assert len(log.events) == 6


# numpy 2 on torch tensors, inside the scheduler's set_timesteps
@pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
def test_clock_counts_every_call_of_a_second_order_scheduler():
    scheduler, log = HeunDiscreteScheduler(), Log()
    Clock.of(scheduler).add(log)
    loop(scheduler, steps=3)
    assert log.events[0] == ("begin", 5)
    assert [e[1] for e in log.events if e[0] == "before"] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", sorted(samplers.ENDS_WITH_A_TIMESTEP))
def test_a_last_timestep_that_is_no_step_is_not_counted(name):
    scheduler, log = getattr(diffusers, name)(), Log()
    Clock.of(scheduler).add(log)
    scheduler.set_timesteps(2)
    sample = torch.zeros(3, 4, 8, 8)
    for t in scheduler.timesteps[:-1]:
        t = t.expand(3) if name == "DDPMWuerstchenScheduler" else t
        sample = scheduler.step(torch.ones_like(sample), t, sample).prev_sample
    assert len(scheduler.timesteps) == 3, "this diffusers gives it another"
    assert log.events[0] == ("begin", 2)
    assert log.events[-1] == ("end", 2), "one short of it, a run never ends"


def test_starting_in_the_middle_shortens_the_run():
    # Image-to-image: set_timesteps(6), then set_begin_index(4): two steps are left, counted from 0.
    scheduler, log = FlowMatchEulerDiscreteScheduler(), Log()
    Clock.of(scheduler).add(log)
    loop(scheduler, steps=6, begin=4)
    assert [e for e in log.events if e[0] == "begin"] == [("begin", 6), ("begin", 2)]
    assert log.events[-1] == ("end", 2)


def test_an_error_in_the_scheduler_ends_the_run():
    scheduler, log = DDIMScheduler(), Log()
    Clock.of(scheduler).add(log)
    scheduler.set_timesteps(2)
    with pytest.raises(TypeError):
        scheduler.step(None, 1, None)
    assert log.events[-1] == ("end", 0)


def test_two_listeners_leave_in_any_order():
    scheduler, first, second = DDIMScheduler(), Log(), Log()
    leave_first = Clock.of(scheduler).add(first)
    leave_second = Clock.of(scheduler).add(second)
    leave_first()
    loop(scheduler)
    assert not first.events
    assert len(second.events) == 6
    leave_second()
    assert "step" not in vars(scheduler)


COPIES = [copy.copy, copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))]


@pytest.mark.parametrize("make", [DDIMScheduler, FlowMatchEulerDiscreteScheduler])
@pytest.mark.parametrize("copied", COPIES, ids=["copy", "deepcopy", "pickle"])
def test_a_copy_is_a_plain_scheduler_of_its_own(make, copied):
    scheduler, log = make(), Log()
    undo = Clock.of(scheduler).add(log)
    scheduler.set_timesteps(4)
    events = list(log.events)
    twin = copied(scheduler)
    loop(twin, steps=7)
    assert (len(scheduler.timesteps), len(twin.timesteps)) == (4, 7)
    assert log.events == events
    assert "step" not in vars(twin)
    undo()
    plain = make()
    plain.set_timesteps(7)
    assert torch.equal(twin.timesteps, plain.timesteps)
    assert set(vars(twin)) == set(vars(scheduler))
    Clock.of(twin).add(Log())
    assert Clock.of(twin) is not Clock.of(scheduler)


def test_a_clock_does_not_keep_its_scheduler():
    scheduler = DDIMScheduler()
    Clock.of(scheduler).add(Log())
    gone = weakref.ref(scheduler)
    del scheduler
    gc.collect()
    assert gone() is None


def test_readback():
    assert Readback(torch.tensor(1.5)).read() == 1.5
