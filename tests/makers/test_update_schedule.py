"""Update schedules have exactly the updates that were asked for, where they were asked for."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from distcurv.errors import ConfigError
from distcurv.makers import get_update_schedule
from distcurv.makers.schedule import INTERVAL_TYPES, UpdateTimes

ratios = st.floats(0, 1)


def places(schedule: list[bool]) -> list[int]:
    return [step for step, due in enumerate(schedule) if due]


@given(st.integers(1, 400), ratios, ratios, st.sampled_from(INTERVAL_TYPES), st.booleans())
def test_the_count_is_exact(
    steps: int, update_ratio: float, warmup_ratio: float, interval_type: str, reverse: bool
) -> None:
    updates, warmup = int(steps * update_ratio), int(steps * warmup_ratio)
    assume(warmup <= updates)
    schedule = get_update_schedule(steps, update_ratio, warmup_ratio, interval_type, reverse)
    assert len(schedule) == steps
    assert sum(schedule) == updates
    if reverse:
        schedule.reverse()
    assert all(schedule[:warmup])


@given(st.integers(1, 60), st.data(), st.sampled_from(INTERVAL_TYPES))
def test_few_and_all_updates(steps: int, data: st.DataObject, interval_type: str) -> None:
    updates = data.draw(st.sampled_from([0, 1, 2, 3, steps - 1, steps]))
    assume(0 <= updates <= steps and int(steps * (updates / steps)) == updates)
    found = places(get_update_schedule(steps, updates / steps, 0.0, interval_type))
    assert len(found) == updates
    assert found[:1] == [0] * min(updates, 1)


@given(st.integers(3, 400), st.integers(3, 60))
def test_linear_distances_begin_with_one_grow_and_reach_the_end(steps: int, updates: int) -> None:
    assume(updates <= steps and int(steps * (updates / steps)) == updates)
    found = places(get_update_schedule(steps, updates / steps, 0.0, "linear"))
    gaps = [b - a for a, b in pairwise(found)]
    assert gaps[0] == 1
    assert found[-1] == steps - 1
    # As integers allow: no distance is more than one below an earlier one.
    assert all(b >= a - 1 for i, a in enumerate(gaps) for b in gaps[i:])


@given(st.integers(1, 400), st.integers(1, 400))
def test_constant_distances_differ_by_one_at_most(steps: int, updates: int) -> None:
    assume(updates <= steps and int(steps * (updates / steps)) == updates)
    found = places(get_update_schedule(steps, updates / steps))
    gaps = [b - a for a, b in pairwise([*found, steps])]
    assert max(gaps) - min(gaps) <= 1


def test_by_hand() -> None:
    assert places(get_update_schedule(10, 0.4, 0.2)) == [0, 1, 2, 6]
    assert places(get_update_schedule(10, 0.4, 0.2, "step")) == [0, 1, 2, 3]
    assert places(get_update_schedule(11, 0.46, 0.0, "linear")) == [0, 1, 3, 6, 10]
    assert places(get_update_schedule(10, 0.2, 0.0, "linear")) == [0, 9]
    assert places(get_update_schedule(10, 0.4, 0.2, "step", reverse=True)) == [6, 7, 8, 9]
    assert places(get_update_schedule(3, 0.0)) == []
    # What ASDL's rounding loses: floor(7/5) = 1 puts them all at the beginning.
    assert places(get_update_schedule(7, 5 / 7)) == [0, 1, 2, 4, 5]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"num_total_steps": 0}, "num_total_steps"),
        ({"num_total_steps": 2.5}, "num_total_steps"),
        ({"update_ratio": 1.1}, "update_ratio"),
        ({"update_ratio": -0.1}, "update_ratio"),
        ({"update_ratio": float("nan")}, "update_ratio"),
        ({"warmup_ratio": 2}, "warmup_ratio"),
        ({"update_ratio": 0.1, "warmup_ratio": 0.5}, "warmup_ratio"),
        ({"interval_type": "cosine"}, "interval_type"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        get_update_schedule(**{"num_total_steps": 10, **arguments})  # type: ignore[arg-type]


def test_times_by_interval_count_from_the_end_of_the_warm_up() -> None:
    times = UpdateTimes(None, 4, 3)
    assert [step for step in range(16) if times.due(step)] == [0, 1, 2, 3, 7, 11, 15]


def test_times_by_schedule_end_with_it() -> None:
    times = UpdateTimes([True, False, True], 1, 0)
    assert [step for step in range(9) if times.due(step)] == [0, 2]
