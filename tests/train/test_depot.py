"""The depot: which versions are believed, what counts as dropped, waits with a deadline."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from train_rig import DEADLINE, Events, filled_depot, make_table

from distcurv.train.depot import Depot, InFlight

SESSION = b"s" * 16
FLIGHT = InFlight(SESSION, 5, 10, 14, 3)


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def depot(events: Events) -> Depot:
    depot = filled_depot(make_table(3), events)
    depot.depart([0, 1], FLIGHT)
    return depot


def accept(depot: Depot, block: int = 0, **change: object) -> bool:
    said = {"session": SESSION, "seq": 5, "version": 1, "flat": torch.ones(3), "route": "worker"}
    return depot.accept(block, **(said | change))  # type: ignore[arg-type]


def test_the_answer_to_what_is_in_flight_is_believed(depot: Depot) -> None:
    assert accept(depot)
    state = depot.states(0)[-1]
    assert (state.version, state.since, state.through, state.route) == (1, 10, 14, "worker")
    assert torch.equal(state.flat, torch.ones(3))
    assert depot.in_flight(0) is None
    assert depot.in_flight(1) == FLIGHT
    assert (depot.counts.folded, depot.counts.from_workers, depot.counts.inline) == (3, 1, 0)


def test_versions_made_in_process_are_counted_apart(depot: Depot) -> None:
    assert accept(depot, route="inline")
    assert (depot.counts.from_workers, depot.counts.inline) == (0, 1)


@pytest.mark.parametrize(
    "lie",
    [{"session": b"t" * 16}, {"seq": 4}, {"seq": 6}, {"version": 0}, {"version": 2}, {"block": 2}],
    ids=str,
)
def test_anything_else_is_refused(depot: Depot, lie: dict[str, object]) -> None:
    assert not accept(depot, **lie)  # type: ignore[arg-type]
    assert [depot.states(b)[-1].version for b in range(3)] == [0, 0, 0]
    assert depot.in_flight_steps() == 6
    assert depot.counts.folded == 0


def test_a_repeat_is_refused(depot: Depot) -> None:
    assert accept(depot)
    assert not accept(depot)
    assert not accept(depot, version=2)


def test_a_late_answer_after_the_drop_is_refused(depot: Depot) -> None:
    depot.drop_in_flight("lost", session=SESSION)
    assert not accept(depot)
    assert depot.counts.folded == 0


def test_a_lost_session_drops_all_that_it_had(depot: Depot, events: Events) -> None:
    depot.depart([2], InFlight(b"other", 0, 10, 14, 1))
    assert depot.drop_in_flight("lost", session=SESSION) == 6
    assert depot.counts.dropped == 6
    assert events.of("dropped") == [{"blocks": [0, 1], "steps": 6, "reason": "lost"}]
    assert depot.in_flight(2) is not None
    assert depot.drop_in_flight("lost", session=SESSION) == 0
    assert len(events.of("dropped")) == 1


@pytest.mark.parametrize(
    ("which", "lost"),
    [({"blocks": [0]}, 3), ({"seq": 5}, 6), ({"seq": 4}, 0), ({"seq": 5, "blocks": [1, 2]}, 3)],
)
def test_a_refusal_drops_what_it_names(depot: Depot, which: dict[str, object], lost: int) -> None:
    assert depot.drop_in_flight("refused", session=SESSION, **which) == lost  # type: ignore[arg-type]
    assert depot.in_flight_steps() == 6 - lost


def test_what_never_left_is_counted_too(depot: Depot, events: Events) -> None:
    depot.drop([1, 2], 4, "closed")
    depot.drop([1], 0, "closed")
    depot.drop([], 4, "closed")
    assert depot.counts.dropped == 8
    assert events.of("dropped") == [{"blocks": [1, 2], "steps": 8, "reason": "closed"}]


def test_pruning_keeps_the_newest(depot: Depot) -> None:
    for version in (1, 2, 3):
        depot.depart([0], InFlight(SESSION, version, 0, 4, 1))
        assert accept(depot, seq=version, version=version)
    depot.prune(0, 2)
    assert [s.version for s in depot.states(0)] == [2, 3]
    depot.prune(0, 9)
    assert [s.version for s in depot.states(0)] == [2, 3]


def test_a_list_of_states_is_a_snapshot(depot: Depot) -> None:
    before = depot.states(0)
    assert accept(depot)
    assert [s.version for s in before] == [0]


def test_waiting_ends_when_a_version_comes(depot: Depot) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(depot.wait, lambda: depot.in_flight(0) is None, DEADLINE)
        assert accept(depot)
        assert waiting.result(DEADLINE)


def test_waiting_ends_when_a_statistic_is_dropped(depot: Depot) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(depot.wait, lambda: not depot.in_flight_steps(), DEADLINE)
        depot.drop_in_flight("lost", session=SESSION)
        assert waiting.result(DEADLINE)


def test_waiting_looks_again_when_told(depot: Depot) -> None:
    flag = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(depot.wait, flag.is_set, DEADLINE)
        flag.set()
        depot.notify()
        assert waiting.result(DEADLINE)


def test_waiting_has_a_deadline(depot: Depot) -> None:
    begin = time.monotonic()
    assert not depot.wait(lambda: False, 0.05)
    assert time.monotonic() - begin >= 0.05
    assert depot.wait(lambda: True, 0.0)


def test_totals_add_up(depot: Depot) -> None:
    depot.count(observed=3, bytes_in=10)
    depot.count(observed=4)
    assert (depot.counts.observed, depot.counts.bytes_in) == (7, 10)
