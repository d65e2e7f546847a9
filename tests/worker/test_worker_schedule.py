"""The schedule is a pure function: a table of cases and the properties that hold for all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distcurv.errors import ConfigError
from distcurv.worker.schedule import Pick, Snapshot, Waiting, plan
from distcurv.worker.settings import WorkerSettings

SETTINGS = WorkerSettings(patience=1.0, max_batch=3)


def waiting(
    block: int,
    arrived: float = 0.0,
    innovation: float = 0.5,
    session: int = 0,
    seq: int = 0,
    shape: str = "s",
    nbytes: int = 8,
) -> Waiting:
    return Waiting(session, block, seq, shape, arrived, nbytes, innovation)


CASES = {
    "nothing waits": ([], []),
    "older first": (
        [waiting(0, arrived=2.0, seq=1), waiting(1, arrived=1.0, seq=0)],
        [Pick(0, 0, (1,)), Pick(0, 1, (0,))],
    ),
    "larger residual first": (
        [waiting(0, innovation=0.1, shape="x"), waiting(1, innovation=0.9, shape="y")],
        [Pick(0, 0, (1,)), Pick(0, 0, (0,))],
    ),
    "never refreshed counts as the largest": (
        [waiting(0, innovation=0.9, shape="x"), waiting(1, innovation=-1.0, shape="y")],
        [Pick(0, 0, (1,)), Pick(0, 0, (0,))],
    ),
    "a residual is worth at most the patience": (
        [waiting(0, 5.0, innovation=1e6, seq=1), waiting(1, 3.9, innovation=0.0, seq=0)],
        [Pick(0, 0, (1,)), Pick(0, 1, (0,))],
    ),
    "equal shapes of a message share a call": (
        [waiting(0), waiting(1), waiting(2, shape="other")],
        [Pick(0, 0, (0, 1)), Pick(0, 0, (2,))],
    ),
    "a call is bounded, the most urgent go first": (
        [waiting(block, innovation=block / 10) for block in range(5)],
        [Pick(0, 0, (4, 3, 2)), Pick(0, 0, (1, 0))],
    ),
    "messages are not mixed": (
        [waiting(0, seq=1), waiting(1, seq=2)],
        [Pick(0, 1, (0,)), Pick(0, 2, (1,))],
    ),
    "sessions are not mixed": (
        [waiting(0, session=0), waiting(0, session=1)],
        [Pick(0, 0, (0,)), Pick(1, 0, (0,))],
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_table(case: tuple[list[Waiting], list[Pick]]) -> None:
    entries, expected = case
    picks, reason = plan(10.0, Snapshot(tuple(entries)), SETTINGS)
    assert picks == expected
    assert reason


def test_calls_are_bounded_in_bytes() -> None:
    entries = tuple(waiting(block, nbytes=40) for block in range(4))
    picks, _ = plan(0.0, Snapshot(entries), WorkerSettings(max_batch_bytes=100))
    assert [pick.blocks for pick in picks] == [(0, 1), (2, 3)]
    picks, _ = plan(0.0, Snapshot(entries), WorkerSettings(max_batch_bytes=10))
    assert [pick.blocks for pick in picks] == [(0,), (1,), (2,), (3,)], "a large block goes alone"


snapshots = st.lists(
    st.builds(
        Waiting,
        session=st.integers(0, 2),
        block=st.integers(0, 6),
        seq=st.integers(0, 3),
        shape_key=st.sampled_from(["x", "y"]),
        arrived=st.floats(0, 20),
        nbytes=st.just(8),
        innovation=st.floats(-1, 10),
    ),
    max_size=20,
    unique_by=lambda entry: (entry.session, entry.block),
).map(lambda entries: Snapshot(tuple(entries)))


@given(snapshots, st.randoms(use_true_random=False))
def test_every_statistic_is_planned_once_in_bounded_uniform_calls(snapshot, random) -> None:
    by_place = {(entry.session, entry.block): entry for entry in snapshot.waiting}
    picks, _ = plan(20.0, snapshot, SETTINGS)
    planned = [(pick.session, block) for pick in picks for block in pick.blocks]
    assert sorted(planned) == sorted(by_place)
    for pick in picks:
        entries = [by_place[pick.session, block] for block in pick.blocks]
        assert 1 <= len(entries) <= SETTINGS.max_batch
        assert {entry.seq for entry in entries} == {pick.seq}
        assert len({entry.shape_key for entry in entries}) == 1
    shuffled = list(snapshot.waiting)
    random.shuffle(shuffled)
    assert plan(20.0, Snapshot(tuple(shuffled)), SETTINGS)[0] == picks, "order of arrival only"


@given(snapshots)
def test_whoever_waited_out_the_patience_is_not_overtaken(snapshot) -> None:
    picks, _ = plan(20.0, snapshot, SETTINGS)
    if not picks:
        return
    first = {(picks[0].session, block) for block in picks[0].blocks}
    taken = [entry for entry in snapshot.waiting if (entry.session, entry.block) in first]
    oldest = min(entry.arrived for entry in snapshot.waiting)
    # Something of the first call arrived before anybody's patience after the oldest had run out.
    assert min(entry.arrived for entry in taken) <= oldest + SETTINGS.patience


def test_nobody_starves_under_a_flood_of_large_residuals() -> None:
    """One call per 0.1 s, a new urgent statistic each time: the dull one is still served."""
    dull = waiting(0, arrived=0.0, innovation=0.0, session=9)
    urgent: list[Waiting] = []
    for tick in range(100):
        now = tick * 0.1
        urgent += [waiting(tick, now, 1.0, seq=tick), waiting(1000 + tick, now, 1.0, seq=tick)]
        picks, _ = plan(now, Snapshot((dull, *urgent)), SETTINGS)
        if picks[0].session == 9:
            assert now >= SETTINGS.patience, "its residual is 0: it may wait that long"
            return
        urgent = [entry for entry in urgent if entry.block not in picks[0].blocks]
    pytest.fail("the dull statistic was never served")


@pytest.mark.parametrize(
    "field",
    [
        {"heartbeat": 0.0},
        {"heartbeat": float("nan")},
        {"session_timeout": 0.5},
        {"max_batch": 0},
        {"max_blocks": True},
        {"max_memory": 1.5},
        {"max_bases": 2},
        {"patience": -1.0},
        {"threads": 0},
        {"device": "abacus"},
        {"device": "meta"},
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(field: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(field))):
        WorkerSettings(**field)  # type: ignore[arg-type]
