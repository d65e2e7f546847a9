"""The timetable: every mode closes, posts, polls and installs in an order that works."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from distcurv.config import KfacConfig, ServiceConfig
from distcurv.train.timetable import Action, Plan, Timetable

SWITCH = [Action.POLL, Action.ANNOUNCE, Action.INSTALL]


@st.composite
def timetables(draw: st.DrawFn, *, modes: tuple[str, ...] = ("free", "delay")) -> Timetable:
    interval = draw(st.integers(1, 12))
    deterministic = draw(st.sampled_from(modes)) == "delay"
    config = ServiceConfig(
        preconditioner_upd_interval=interval,
        curvature_upd_interval=draw(st.integers(1, interval)),
        early_steps=draw(st.integers(0, 30)),
        early_interval=draw(st.integers(1, 6)),
        install_delay=draw(st.integers(0, min(30, 12 * interval))) if deterministic else None,
    )
    return Timetable.from_config(config, inline=draw(st.booleans()))


def horizon(table: Timetable) -> int:
    return table.early_steps + 6 * table.interval + (table.install_delay or 0) + 4


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


@given(timetables(modes=("free",)))
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


@given(timetables(modes=("free",)))
def test_short_intervals_do_everything_within_one_step(table: Timetable) -> None:
    for step in range(table.early_steps, horizon(table)):
        actions = table.plan(step).actions
        if table.interval < 4:
            assert not actions or [a for a in actions if a is not Action.AWAIT] == [
                *SWITCH,
                Action.CLOSE,
                Action.POST,
            ]
        else:
            assert not table.plan(step).together


@given(timetables(modes=("free",)))
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


@given(timetables())
def test_after_the_early_phase_statistics_come_at_their_interval(table: Timetable) -> None:
    settled = table.early_steps + 2 * table.interval + 3
    for step in range(settled, settled + 3 * table.interval):
        assert table.capture_due(step) == (step % table.capture_interval == 0)


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
