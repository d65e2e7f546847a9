"""The timetable: every mode closes, posts, polls and installs in an order that works."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distcurv.config import KfacConfig, ServiceConfig
from distcurv.errors import ConfigError
from distcurv.train.cycles import Cycle, Cycles
from distcurv.train.timetable import Action, Plan, Timetable

MOST = 12  # steps between two installs
SWITCH = [Action.POLL, Action.ANNOUNCE, Action.INSTALL]


@st.composite
def timetables(
    draw: st.DrawFn, *, modes: tuple[str, ...] = ("free", "delay", "varying")
) -> Timetable:
    mode = draw(st.sampled_from(modes))
    interval = draw(st.integers(1, MOST))
    settings: dict[str, Any] = {
        "preconditioner_upd_interval": interval,
        "curvature_upd_interval": draw(st.integers(1, interval)),
    }
    if mode == "delay":
        settings["install_delay"] = draw(st.integers(0, min(30, 12 * interval)))
    elif mode == "varying":
        lengths = draw(st.lists(st.integers(1, MOST), min_size=1, max_size=5))
        settings["preconditioner_upd_interval"] = lambda step: lengths[step % len(lengths)]
        every = draw(st.sampled_from(["default", "number", "function"]))
        settings["curvature_upd_interval"] = {
            "default": None,
            "number": draw(st.integers(1, min(lengths))),
            "function": lambda step: 1 + (7 * step) % lengths[step % len(lengths)],
        }[every]
    config = ServiceConfig(
        early_steps=draw(st.integers(0, 30)), early_interval=draw(st.integers(1, 6)), **settings
    )
    return Timetable.from_config(config, inline=draw(st.booleans()))


def horizon(table: Timetable) -> int:
    return table.early_steps + 6 * MOST + (table.install_delay or 0) + 4


def timeline(table: Timetable) -> list[tuple[int, Action]]:
    return [(step, a) for step in range(horizon(table)) for a in table.plan(step).actions]


def steps_of(table: Timetable, wanted: Action) -> list[int]:
    return [step for step, action in timeline(table) if action is wanted]


@given(timetables())
def test_every_close_is_followed_by_one_post_before_the_next_close(table: Timetable) -> None:
    order = [a for _, a in timeline(table) if a in (Action.CLOSE, Action.POST)]
    assert order[::2] == [Action.CLOSE] * len(order[::2])
    assert order[1::2] == [Action.POST] * len(order[1::2])
    assert len(order) >= 4


@given(timetables())
def test_polls_are_announced_and_installed_in_order(table: Timetable) -> None:
    order = [a for _, a in timeline(table) if a in SWITCH]
    assert order == (SWITCH * len(order))[: len(order)]
    assert len(order) >= 3


@given(timetables())
def test_a_step_waits_only_right_before_its_own_poll(table: Timetable) -> None:
    for step in range(horizon(table)):
        actions = table.plan(step).actions
        if Action.AWAIT in actions:
            assert actions[actions.index(Action.AWAIT) + 1] is Action.POLL


@given(timetables(modes=("free", "varying")))
def test_an_asynchronous_step_with_workers_never_waits(table: Timetable) -> None:
    table = Timetable(**{**vars(table), "inline": False})
    for step in range(table.early_steps, horizon(table)):
        assert Action.AWAIT not in table.plan(step).actions


@given(timetables(modes=("delay",)))
def test_the_deterministic_mode_installs_each_window_exactly_k_steps_later(
    table: Timetable,
) -> None:
    assert table.install_delay is not None
    closes = [s for s in steps_of(table, Action.CLOSE) if not table.is_early(s)]
    installs = [s for s in steps_of(table, Action.INSTALL) if not table.is_early(s)]
    due = [s + table.install_delay for s in closes]
    assert installs == [s for s in due if s < horizon(table)]
    for step in installs:
        assert table.plan(step).based_on == step - table.install_delay
        assert Action.AWAIT in table.plan(step).actions


@given(timetables())
def test_early_steps_refresh_and_install_within_the_step(table: Timetable) -> None:
    everything = (Action.CLOSE, Action.POST, Action.AWAIT, *SWITCH)
    for step in range(table.early_steps):
        due = step % table.early_interval == 0
        assert table.plan(step) == (Plan(everything, True, None) if due else Plan((), False, None))
    assert not any(table.plan(s).early for s in range(table.early_steps, horizon(table)))


@given(timetables(modes=("free", "varying")))
def test_short_intervals_do_everything_within_one_step(table: Timetable) -> None:
    for step in range(table.early_steps, horizon(table)):
        actions = table.plan(step).actions
        if table.cycles.at(step).interval < 4:
            assert not actions or [a for a in actions if a is not Action.AWAIT] == [
                *SWITCH,
                Action.CLOSE,
                Action.POST,
            ]
        else:
            assert not table.plan(step).together


@given(timetables(modes=("free", "varying")))
def test_an_asynchronous_window_closes_right_after_the_install(table: Timetable) -> None:
    for step in range(table.early_steps, horizon(table)):
        actions = table.plan(step).actions
        if Action.CLOSE in actions:
            assert actions[actions.index(Action.CLOSE) - 1] is Action.INSTALL


def test_the_asynchronous_cycle_is_that_of_the_decision() -> None:
    config = ServiceConfig(preconditioner_upd_interval=5, early_steps=3)
    table = Timetable.from_config(config, inline=False)
    expected = {
        0: (Action.POLL,),
        1: (Action.ANNOUNCE,),
        2: (Action.INSTALL, Action.CLOSE),
        3: (Action.POST,),
        4: (),
    }
    assert [table.plan(step).actions for step in (3, 4)] == [(), ()]  # first multiple of T is 5
    for step in range(5, 30):
        assert table.plan(step) == Plan(expected[step % 5], False, None)


@given(timetables())
def test_every_window_has_a_statistic(table: Timetable) -> None:
    since = 0
    for through in steps_of(table, Action.CLOSE):
        due = [step for step in range(since, through + 1) if table.capture_due(step)]
        assert due, (since, through)
        since = through + 1


@given(timetables())
def test_an_early_window_ends_with_a_statistic(table: Timetable) -> None:
    for step in range(table.early_steps):
        if Action.CLOSE in table.plan(step).actions:
            assert table.capture_due(step)


@given(timetables(modes=("free", "delay")))
def test_after_the_early_phase_statistics_come_at_their_interval(table: Timetable) -> None:
    settled = table.early_steps + 2 * MOST + 3
    for step in range(settled, settled + 3 * MOST):
        assert table.capture_due(step) == (step % table.cycles.at(0).capture_interval == 0)


@given(timetables())
def test_install_step_is_the_next_install(table: Timetable) -> None:
    installs = steps_of(table, Action.INSTALL)
    for step in steps_of(table, Action.POLL):
        later = [s for s in installs if s >= step]
        if later:
            assert table.install_step(step) == later[0]


@given(timetables())
def test_together_says_that_a_collective_begins_and_ends_within_the_step(table: Timetable) -> None:
    for step in range(horizon(table)):
        actions = table.plan(step).actions
        reduces = Action.CLOSE in actions and Action.POST in actions
        polls = Action.POLL in actions and Action.ANNOUNCE in actions
        assert table.plan(step).together == (reduces or polls)


def test_the_early_phase_of_a_config() -> None:
    config = ServiceConfig(preconditioner_upd_interval=20, early_interval=4)
    table = Timetable.from_config(config, inline=False)
    assert (table.early_steps, table.early_interval) == (80, 4)
    assert Timetable.from_config(KfacConfig(kind="dense"), inline=False).early_steps == 0
    short = ServiceConfig(preconditioner_upd_interval=1, early_interval=4)
    assert Timetable.from_config(short, inline=False).early_interval == 1


# -- intervals that are functions of the step ---------------------------------------------


def growing(step: int) -> int:
    """2, 2, 2, 2, 2 (from 10) 5, 5, (from 20) 10, ..."""
    return 2 if step < 10 else step // 4 + 3 if step < 16 else 10


def test_each_cycle_is_as_long_as_the_function_says_of_its_first_step() -> None:
    cycles = Cycles(ServiceConfig(preconditioner_upd_interval=growing))
    starts = sorted({cycles.at(step).start for step in range(60)})
    assert starts == [0, 2, 4, 6, 8, 10, 15, 21, 31, 41, 51]
    assert cycles.at(17) == Cycle(15, 6, 3, 15, 60)
    assert cycles.at(21) == Cycle(21, 10, 5, 21, 100)
    assert cycles.first_from(11).start == 15
    assert cycles.first_from(15).start == 15


@given(st.lists(st.integers(0, 300), max_size=30))
def test_which_cycle_a_step_is_in_does_not_depend_on_what_was_asked_before(
    asked: list[int],
) -> None:
    config = ServiceConfig(preconditioner_upd_interval=growing)
    used = Cycles(config)
    for step in asked:
        assert used.at(step) == Cycles(config).at(step)


def test_a_constant_function_is_as_good_as_its_number() -> None:
    """But for statistics, which are counted from the start of each window."""
    settings: dict[str, Any] = {"early_steps": 7, "early_interval": 2}
    number = ServiceConfig(preconditioner_upd_interval=6, curvature_upd_interval=3, **settings)
    function = ServiceConfig(
        preconditioner_upd_interval=lambda step: 6,
        curvature_upd_interval=lambda step: 3,
        **settings,
    )
    one, other = (Timetable.from_config(c, inline=False) for c in (number, function))
    for step in range(60):
        assert one.plan(step) == other.plan(step)
        assert one.capture_due(step) == other.capture_due(step)
        assert one.staleness_bound(step) == other.staleness_bound(step)


def test_the_early_phase_does_not_look_at_the_function() -> None:
    config = ServiceConfig(preconditioner_upd_interval=growing, early_steps=12, early_interval=2)
    table = Timetable.from_config(config, inline=True)
    early = [step for step in range(12) if table.plan(step).actions]
    assert early == [0, 2, 4, 6, 8, 10]
    assert all(table.plan(step).early for step in early)
    assert table.first_sync == 15
    assert not table.plan(12).actions and table.plan(15).actions


def test_without_delay_windows_may_grow_and_statistics_have_times_of_their_own() -> None:
    config = ServiceConfig(
        preconditioner_upd_interval=growing,
        install_delay=0,
        early_steps=0,
        statistics_at=lambda step: step % 7 == 0,
    )
    table = Timetable.from_config(config, inline=False)
    installs = [(s, table.plan(s).based_on) for s in range(32) if table.plan(s).actions]
    assert installs == [(s, s) for s in (0, 2, 4, 6, 8, 10, 15, 21, 31)]
    assert [s for s in range(32) if table.capture_due(s)] == [0, 7, 14, 21, 28]


def test_the_bound_on_staleness_is_that_of_the_longer_of_two_windows() -> None:
    config = ServiceConfig(preconditioner_upd_interval=lambda step: 40 if step < 80 else 4)
    table = Timetable.from_config(config, inline=False)
    assert [table.staleness_bound(step) for step in (0, 79, 80, 83, 84)] == [400] * 4 + [40]


def test_a_function_that_gives_no_interval_is_told_with_step_and_value() -> None:
    config = ServiceConfig(
        preconditioner_upd_interval=lambda step: 8 if step < 16 else 0, early_steps=0
    )
    table = Timetable.from_config(config, inline=False)
    table.plan(15)
    with pytest.raises(
        ConfigError, match=r"ServiceConfig.preconditioner_upd_interval at step 16 is 0: give an"
    ):
        table.plan(16)
    config = ServiceConfig(
        preconditioner_upd_interval=8, curvature_upd_interval=lambda step: 1 + step, early_steps=0
    )
    table = Timetable.from_config(config, inline=False)
    with pytest.raises(ConfigError, match=r"curvature_upd_interval at step 8 is 9: .*\(8\)"):
        table.capture_due(8)
