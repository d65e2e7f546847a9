"""Seeds and statistics against the service core: what is folded, what is refused and named."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from worker_fakes import (
    FAILS,
    INFINITE,
    SID,
    SPECS,
    A,
    Script,
    Y,
    beats,
    codes,
    flat,
    seeded,
)

from distcurv.wire.messages import (
    Ack,
    Published,
    Seed,
    Statistics,
)

pytestmark = pytest.mark.usefixtures("fake_kind")


def test_seed_then_statistic_gives_the_next_version_bit_for_bit(script: Script) -> None:
    session = seeded(script)
    assert script.statistic(A, session, 0, {0: (3, Y)}) == []
    (ack_to, ack), (to, published) = script.compute()
    assert (ack_to, ack) == (A, Ack(session, "statistics", [0], [0]))
    assert to == A
    assert isinstance(published, Published)
    assert (published.blocks, published.versions, published.based_on) == ([0], [4], [1])
    assert (published.seqs, published.uncaptured, published.innovation) == ([0], [0.25], [0.5])
    assert torch.equal(published.payload, flat(12, 13, 11.5, 1))  # 1 + Y + 10 * 1; weight 0 + 1


def test_statistics_against_the_older_of_two_seeded_versions(script: Script) -> None:
    session = script.open(A, SPECS)
    payload = flat(1, 1, 1, 0, 5, 5, 5, 0, 2, 2, 2, 0)
    assert script.say(A, Seed(session, [0, 1, 0], [7, 1, 8], [-1, -1, -1], payload)) == []
    script.statistic(A, session, 0, {0: (7, Y)})
    published = script.compute()[1][1]
    assert published.versions == [9]
    assert torch.equal(published.payload, flat(13, 14, 12.5, 1))  # newest 2 + Y + 10 * basis 1
    script.statistic(A, session, 1, {0: (8, Y)})
    assert torch.equal(script.compute()[1][1].payload, flat(34, 36, 33, 2))  # + Y + 10 * basis 2
    (refusal,) = script.statistic(A, session, 2, {0: (7, Y)})
    assert codes([refusal]) == ["unknown_basis"], "bases before the last statistic's are dropped"
    assert (refusal.blocks, refusal.seq) == ([0], 2)


@pytest.mark.parametrize(
    "seed",
    [
        Seed(SID, [2], [4], [0], flat(0, 0, 0, 0)),  # no such block
        Seed(SID, [0, 0], [5, 5], [0, 0], flat(0, 0, 0, 0, 0, 0, 0, 0)),  # twice the same
        Seed(SID, [0] * 5, [4, 5, 6, 7, 8], [0] * 5, torch.zeros(20)),  # more than max_bases
        Seed(SID, [0, 0], [5, 4], [0, 0], flat(0, 0, 0, 0, 0, 0, 0, 0)),  # newest first
        Seed(SID, [0], [4], [0], flat(0, 0, 0)),  # too short
        Seed(SID, [0], [4], [0], flat(0, 0, 0, 0, 0)),  # too long
        Seed(SID, [0], [4], [0], flat(0, 0, 0, 0).double()),
        Seed(SID, [0], [4], [0], flat(0, 0, 0, 0).view(2, 2)),
        Seed(SID, [0], [4], [0], flat(0, 0, torch.inf, 0)),
        Seed(SID, [0], [4, 5], [0], flat(0, 0, 0, 0)),  # torn lists
    ],
)
def test_bad_seeds_change_nothing(script: Script, seed: Seed) -> None:
    seeded(script, A, session=SID)
    assert codes(script.say(A, seed)) == ["bad_seed"]
    script.statistic(A, SID, 0, {0: (3, Y)})
    assert script.compute()[1][1].versions == [4]


@pytest.mark.parametrize("version", [2, 3, 9], ids=["older", "same", "newer"])
def test_a_seed_starts_its_block_anew_and_leaves_the_others(script: Script, version: int) -> None:
    """Owners seed again when another route served a block, or when they gave a statistic up."""
    session = seeded(script)
    for seq in range(2):
        script.statistic(A, session, seq, {0: (3, Y), 1: (3, Y)})
    job = script.service.next_job(script.now)
    script.seed(A, session, 0, version, flat(5, 5, 5))
    ack, published = (message for _, message in script.finish(job))
    assert (ack.blocks, published.blocks, published.versions) == ([1], [1], [4])
    assert script.compute()[1][1].blocks == [1], "the queue of block 0 is gone"
    assert script.compute() == []
    if version != 3:
        assert codes(script.statistic(A, session, 2, {0: (3, Y)})) == ["unknown_basis"]
    script.statistic(A, session, 3, {0: (version, Y)})
    published = script.compute()[1][1]
    assert published.versions == [version + 1]
    assert torch.equal(published.payload, flat(56, 57, 55.5, 1))
    script.seed(A, session, 0, version, flat(5, 5, 5))
    resent = beats(script, 0.0) + beats(script, 1.0)
    assert [message.blocks for message in resent if isinstance(message, Published)] == [[1]], (
        "what it replaced is not resent"
    )


def test_blocks_of_a_message_share_a_call(script: Script) -> None:
    session = seeded(script)
    script.statistic(A, session, 0, {1: (3, Y), 0: (3, Y)})
    ack, published = (message for _, message in script.compute())
    assert ack == Ack(session, "statistics", [0, 1], [0, 0])
    assert published.versions == [4, 4]
    assert torch.equal(published.payload, flat(12, 13, 11.5, 1, 23, 24, 22.5, 1))
    assert script.compute() == []


def test_queued_statistics_are_folded_one_by_one_in_order(script: Script) -> None:
    session = seeded(script)
    script.statistic(A, session, 0, {0: (3, flat(1, 0, 0))})
    script.statistic(A, session, 1, {0: (3, flat(2, 0, 0))})
    first, second = script.compute()[1][1], script.compute()[1][1]
    assert (first.versions, first.seqs, first.based_on) == ([4], [0], [1])
    assert (second.versions, second.seqs, second.based_on) == ([5], [1], [2])
    assert torch.equal(second.payload, flat(24, 21, 21, 2))  # 1 + (1 + 10) + (2 + 10), 1 + 2 * 10


def test_a_queue_that_is_full_refuses_and_names_the_statistic(script: Script) -> None:
    session = seeded(script)
    for seq in range(2):
        assert script.statistic(A, session, seq, {0: (3, Y)}) == []
    (refusal,) = script.statistic(A, session, 2, {0: (3, Y), 1: (3, Y)})
    assert (refusal.code, refusal.blocks, refusal.seq) == ("overrun", [0], 2)
    jobs = 0
    while script.compute():
        jobs += 1
    assert jobs == 3, "two of block 0 and one of block 1"


def test_a_block_that_was_not_seeded_has_no_basis(script: Script) -> None:
    session = script.open(A, SPECS)
    (refusal,) = script.statistic(A, session, 0, {0: (0, Y)})
    assert (refusal.code, refusal.blocks, refusal.seq) == ("unknown_basis", [0], 0)


def test_a_basis_that_is_not_held_yet_is_unknown(script: Script) -> None:
    session = seeded(script)
    assert codes(script.statistic(A, session, 0, {0: (4, Y)})) == ["unknown_basis"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_statistics_are_refused_and_the_others_of_the_message_taken(
    script: Script, bad: float
) -> None:
    session = seeded(script)
    (refusal,) = script.statistic(A, session, 0, {0: (3, flat(1, bad, 0)), 1: (3, Y)})
    assert (refusal.code, refusal.blocks, refusal.seq) == ("non_finite", [0], 0)
    assert script.compute()[1][1].blocks == [1]


@pytest.mark.parametrize(
    "change",
    [
        {"blocks": [0, 0], "basis": [3, 3]},
        {"blocks": [0, 2]},
        {"blocks": [0, -1]},
        {"basis": [3]},
        {"seq": 5},
        {"since": 9, "through": 8},
        {"payload": flat(0, 0, 0, 1)},
        {"payload": flat(0, 0, 0, 1, 0, 0, 0, 1).double()},
    ],
    ids=str,
)
def test_malformed_statistics_are_refused_whole_with_their_seq(script: Script, change) -> None:
    session = seeded(script)
    script.statistic(A, session, 5, {1: (4, Y)})
    good = Statistics(session, 6, 0, 1, [0, 1], [3, 3], flat(0, 0, 0, 1, 0, 0, 0, 1))
    (refusal,) = script.say(A, dataclasses.replace(good, **change))
    assert refusal.code == "bad_statistic"
    assert refusal.blocks == change.get("blocks", [0, 1])
    assert refusal.seq == change.get("seq", 6)
    assert script.compute() == []
    assert script.say(A, good) == []


def test_bases_are_kept_until_a_newer_one_is_used_and_never_without_bound(script: Script) -> None:
    """max_bases is 4: 3 is in use, 4.. are published and not used; 4 and 5 make way for 7, 8."""
    session = seeded(script)
    for seq in range(5):
        script.statistic(A, session, seq, {0: (3, Y)})
        script.compute()
    bases = script.service.sessions.of(A).store.blocks[0].bases
    assert list(bases) == [3, 6, 7, 8]
    assert codes(script.statistic(A, session, 5, {0: (5, Y)})) == ["unknown_basis"]
    assert script.statistic(A, session, 6, {0: (7, Y)}) == []
    assert list(bases) == [7, 8]


@pytest.mark.parametrize("bad", [FAILS, INFINITE])
def test_a_failed_refresh_keeps_the_version_is_counted_and_spares_the_others(script, bad) -> None:
    session = seeded(script)
    script.statistic(A, session, 0, {0: (3, flat(bad, 0, 0)), 1: (3, Y)})
    ack, published, error = (message for _, message in script.compute())
    assert ack == Ack(session, "statistics", [1], [0])
    assert (published.blocks, published.versions) == ([1], [4])
    assert (error.code, error.blocks, error.seq) == ("refresh_failed", [0], 0)
    assert "one" in error.text
    block = script.service.sessions.of(A).store.blocks[0]
    assert (block.newest, block.failures) == (3, 1)
    assert script.kinds_of_events()[-1] == "warning"
    script.statistic(A, session, 1, {0: (3, Y)})
    published = script.compute()[1][1]
    assert published.versions == [4]
    assert torch.equal(published.payload, flat(12, 13, 11.5, 1)), "as if nothing had been"
