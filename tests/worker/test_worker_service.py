"""The service core against the protocol's rules, message by message; no threads, no sockets."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from worker_fakes import FAILS, INFINITE, JOB, OTHER_JOB, Script, fake_spec, flat, hello

from distcurv.curvature.spec import BlockSpec, SideSpec
from distcurv.errors import ProtocolError
from distcurv.wire.messages import (
    Ack,
    Error,
    Goodbye,
    Heartbeat,
    Message,
    Published,
    Seed,
    Statistics,
    Welcome,
)
from distcurv.worker.settings import WorkerSettings

pytestmark = pytest.mark.usefixtures("fake_kind")

A, B, C = b"A", b"B", b"C"  # peers
SID = b"s" * 16
Y = flat(1, 2, 0.5)
SPECS = [fake_spec("one"), fake_spec("two")]


def codes(messages: list[Message]) -> list[str]:
    return [message.code if isinstance(message, Error) else "-" for message in messages]


@pytest.fixture
def script() -> Script:
    return Script(WorkerSettings(heartbeat=1.0, session_timeout=10.0, max_queued=2, max_bases=4))


def seeded(script: Script, peer: bytes = A, **fields: object) -> bytes:
    session = script.open(peer, SPECS, **fields)
    script.seed(peer, session, 0, 3, flat(1, 1, 1))
    script.seed(peer, session, 1, 3, flat(2, 2, 2))
    return session


# -- sessions ---------------------------------------------------------------------------------


def test_welcome_names_the_session_the_process_and_the_device(script: Script) -> None:
    assert script.say(A, hello(SPECS, session=SID)) == [Welcome(SID, 4711, "cpu")]


@pytest.mark.parametrize(
    "message",
    [
        Seed(SID, [0], [0], [0], flat(0, 0, 0, 0)),
        Statistics(SID, 0, 0, 0, [0], [0], flat(0, 0, 0, 0)),
        Ack(SID, "published", [0], [0]),
        Heartbeat(SID, 0.0, 0),
        Welcome(SID, 1, "cpu"),
    ],
    ids=lambda message: type(message).__name__,
)
def test_anything_before_hello_is_refused(script: Script, message: Message) -> None:
    assert codes(script.say(A, message)) == ["no_session"]
    assert script.compute() == []


@pytest.mark.parametrize("message", [Goodbye(SID, ""), Error(SID, "x", "y")])
def test_goodbye_and_error_without_session_are_not_answered(script: Script, message) -> None:
    assert script.say(A, message) == []


def test_a_message_of_another_session_is_refused(script: Script) -> None:
    session = seeded(script)
    wrong = Statistics(b"w" * 16, 0, 0, 0, [0], [3], flat(0, 0, 0, 1))
    assert codes(script.say(A, wrong)) == ["no_session"]
    stolen = Statistics(session, 0, 0, 0, [0], [3], flat(0, 0, 0, 1))
    assert codes(script.say(B, stolen)) == ["no_session"], "a session belongs to its peer"


def test_hello_repeated_is_welcomed_again_and_loses_nothing(script: Script) -> None:
    session = seeded(script)
    assert isinstance(script.say(A, hello(SPECS, session=session))[0], Welcome)
    assert script.statistic(A, session, 0, {0: (3, Y)}) == []


def test_owners_of_one_job_live_side_by_side(script: Script) -> None:
    first, second = seeded(script, A, owner=0), seeded(script, B, owner=1)
    assert script.statistic(A, first, 0, {0: (3, Y)}) == []
    assert script.statistic(B, second, 0, {0: (3, Y)}) == []
    told = [to for _ in range(2) for to, _ in script.compute()]
    assert sorted(told) == [A, A, B, B]


def test_a_second_job_is_refused_until_all_sessions_of_the_first_said_goodbye(
    script: Script,
) -> None:
    first, second = seeded(script, A, owner=0), seeded(script, B, owner=1)
    asking = hello(SPECS, session=SID, job=OTHER_JOB)
    assert codes(script.say(C, asking)) == ["busy"]
    assert script.say(A, Goodbye(first, "done")) == []
    assert codes(script.say(C, asking)) == ["busy"]
    assert script.say(B, Goodbye(second, "done")) == []
    assert isinstance(script.say(C, asking)[0], Welcome)


def test_a_second_job_comes_in_when_the_first_fell_silent(script: Script) -> None:
    session = seeded(script)
    script.now += 10.1
    told = script.service.on_tick(script.now)
    assert [(to, type(message), message.session) for to, message in told] == [(A, Goodbye, session)]
    assert isinstance(script.say(B, hello(SPECS, session=SID, job=OTHER_JOB))[0], Welcome)
    assert codes(script.statistic(A, session, 0, {0: (3, Y)})) == ["no_session"]


def test_any_message_keeps_a_session_alive(script: Script) -> None:
    session = seeded(script)
    for _ in range(5):
        script.now += 9.0
        script.say(A, Heartbeat(session, 0.0, 0))
        assert Goodbye not in [type(message) for _, message in script.service.on_tick(script.now)]


def test_hello_of_the_same_owner_replaces_its_session(script: Script) -> None:
    old = seeded(script, A)
    script.statistic(A, old, 0, {0: (3, Y)})
    out = script.service.on_message(B, hello(SPECS, session=SID), script.now)
    assert [(to, type(message)) for to, message in out] == [(A, Goodbye), (B, Welcome)]
    assert codes(script.statistic(A, old, 1, {0: (3, Y)})) == ["no_session"]
    assert script.compute() == [], "what the old session had queued is gone"
    assert codes(script.statistic(B, SID, 0, {0: (3, Y)})) == ["unknown_basis"], "state is dropped"


def test_a_new_session_on_the_same_peer_replaces_the_old(script: Script) -> None:
    old = seeded(script, A)
    assert isinstance(script.say(A, hello(SPECS, session=SID, owner=5))[0], Welcome)
    assert codes(script.say(A, Heartbeat(old, 0.0, 0))) == ["no_session"]


def test_newer_generation_replaces_all_and_older_is_refused(script: Script) -> None:
    seeded(script, A, owner=0, generation=1)
    seeded(script, B, owner=1, generation=1)
    asking = hello(SPECS, session=SID, owner=0, generation=0)
    assert codes(script.say(C, asking)) == ["old_generation"]
    newer = dataclasses.replace(asking, generation=2, table_hash=b"x" * 32)
    out = script.service.on_message(C, newer, script.now)
    assert sorted((to, type(message).__name__) for to, message in out) == [
        (A, "Goodbye"),
        (B, "Goodbye"),
        (C, "Welcome"),
    ]


def test_owners_with_different_tables_are_refused(script: Script) -> None:
    seeded(script, A, owner=0)
    asking = hello(SPECS, session=SID, owner=1, table_hash=b"x" * 32)
    assert codes(script.say(B, asking)) == ["table_mismatch"]


def test_another_protocol_version_is_refused(script: Script) -> None:
    assert codes(script.say(A, hello(SPECS, session=SID, protocol=2))) == ["protocol"]


def test_invalid_bytes_end_the_session_of_their_peer_only(script: Script) -> None:
    first, second = seeded(script, A, owner=0), seeded(script, B, owner=1)
    (error,) = script.say(A, ProtocolError("truncated", "half a message"))
    assert isinstance(error, Error)
    assert (error.session, error.code) == (first, "truncated")
    assert codes(script.say(A, Heartbeat(first, 0.0, 0))) == ["no_session"]
    assert script.say(B, Heartbeat(second, 0.0, 0)) == []
    (error,) = script.say(C, ProtocolError("unknown_kind", "?"))
    assert isinstance(error, Error)
    assert error.session == b""


def test_messages_that_are_not_for_a_worker_are_refused(script: Script) -> None:
    session = seeded(script)
    assert codes(script.say(A, Welcome(session, 1, "cpu"))) == ["unexpected"]
    assert codes(script.say(A, Ack(session, "statistics", [0], [0]))) == ["unexpected"]
    assert script.say(A, Error(session, "bad", "told so")) == []
    assert script.events[-1] == ("warning", {"text": "owner 0 refused: bad: told so"})


# -- the table --------------------------------------------------------------------------------

FIELDS = fake_spec("x").to_fields()
HUGE = BlockSpec("huge", "lowrank", (SideSpec(2**20, 1024), SideSpec(2**20, 1024)), 0.5).to_fields()


@pytest.mark.parametrize(
    ("entries", "code"),
    [
        ([HUGE], "too_large"),
        ([{**FIELDS, "sides": [{**HUGE["sides"][0], "dim": 2**40}]}], "too_large"),
        ([{**FIELDS, "name": str(index)} for index in range(5000)], "too_large"),
        ([{**FIELDS, "kind": "alchemy"}], "unknown_kind"),
        ([FIELDS, FIELDS], "bad_table"),
        ([{"name": "x"}], "bad_table"),
        ([{**FIELDS, "extra": 1}], "bad_table"),
        ([{**FIELDS, "name": 3}], "bad_table"),
        ([{**FIELDS, "decay": 1.0}], "bad_table"),
        ([{**FIELDS, "decay": float("nan")}], "bad_table"),
        ([{**FIELDS, "damping": -1.0}], "bad_table"),
        ([{**FIELDS, "damping": True}], "bad_table"),
        ([{**FIELDS, "relative_damping": 1}], "bad_table"),
        ([{**FIELDS, "sides": []}], "bad_table"),
        ([{**FIELDS, "sides": "A"}], "bad_table"),
        ([{**FIELDS, "sides": [3]}], "bad_table"),
        ([{**FIELDS, "sides": FIELDS["sides"] * 3}], "bad_table"),
        ([{**FIELDS, "sides": [{**FIELDS["sides"][0], "rank": 4}]}], "bad_table"),
        ([{**FIELDS, "sides": [{**FIELDS["sides"][0], "dim": 0}]}], "bad_table"),
        ([{**FIELDS, "sides": [{**FIELDS["sides"][0], "dim": 2.0}]}], "bad_table"),
        ([{**FIELDS, "sides": [{**FIELDS["sides"][0], "tail": "curly"}]}], "bad_table"),
        ([{**FIELDS, "kind": "dense"}], "bad_table"),  # dense needs the dense encoding
    ],
)
def test_block_tables_that_are_refused(script: Script, entries, code: str) -> None:
    asking = dataclasses.replace(hello([], session=SID), blocks=entries)
    assert codes(script.say(A, asking)) == [code]
    assert isinstance(script.say(A, hello(SPECS, session=SID))[0], Welcome), "nothing is left over"


def test_memory_and_blocks_are_counted_over_all_sessions_but_the_replaced() -> None:
    script = Script(WorkerSettings(max_blocks=3))
    script.open(A, SPECS, owner=0)
    assert codes(script.say(B, hello(SPECS, session=SID, owner=1))) == ["too_large"]
    out = script.service.on_message(B, hello(SPECS, session=SID, owner=0), script.now)
    assert [type(message) for _, message in out] == [Goodbye, Welcome]
    one_block = (16 + 1 + 4 + 1) * 4 * 4  # bases, state, queue, one computing; 4 floats each
    script = Script(WorkerSettings(max_memory=3 * one_block))
    script.open(A, SPECS, owner=0)
    assert codes(script.say(B, hello(SPECS, session=SID, owner=1))) == ["too_large"]
    script.open(B, SPECS[:1], owner=1)


# -- seeds ------------------------------------------------------------------------------------


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


# -- statistics -------------------------------------------------------------------------------


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


# -- failures ---------------------------------------------------------------------------------


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


# -- results and resends ----------------------------------------------------------------------


def beats(script: Script, seconds: float) -> list[Message]:
    script.now += seconds
    return [message for _, message in script.service.on_tick(script.now)]


def test_published_is_resent_until_acknowledged(script: Script) -> None:
    session = seeded(script)
    beats(script, 0.0)
    script.statistic(A, session, 0, {0: (3, Y), 1: (3, Y)})
    sent = script.compute()[1][1]
    assert beats(script, 0.5) == []
    for _ in range(3):
        heartbeat, resent = beats(script, 1.0)
        assert isinstance(heartbeat, Heartbeat)
        script.say(A, Heartbeat(session, 0.0, 0))
        assert torch.equal(resent.payload, sent.payload)
        assert resent == dataclasses.replace(sent, payload=resent.payload)
    script.say(A, Ack(session, "published", [1], [4]))
    assert beats(script, 1.0)[1].blocks == [0]
    script.say(A, Ack(session, "published", [0], [3]))
    assert beats(script, 1.0)[1].blocks == [0], "an older version's ack does not count"
    script.say(A, Ack(session, "published", [0], [4]))
    assert [type(message) for message in beats(script, 1.0)] == [Heartbeat]


def test_of_two_unacknowledged_versions_the_latest_is_resent(script: Script) -> None:
    session = seeded(script)
    beats(script, 0.0)
    for seq in range(2):
        script.statistic(A, session, seq, {0: (3, Y)})
        script.compute()
    assert beats(script, 1.0)[1].versions == [5]


def test_resends_are_split_into_bounded_messages() -> None:
    script = Script(WorkerSettings(max_batch_bytes=16))
    session = seeded(script)
    beats(script, 0.0)
    script.statistic(A, session, 0, {0: (3, Y), 1: (3, Y)})
    script.compute(), script.compute()
    assert [message.blocks for message in beats(script, 1.0)[1:]] == [[0], [1]]


@pytest.mark.parametrize(
    "ack",
    [
        Ack(SID, "published", [2], [4]),
        Ack(SID, "published", [0, 1], [4]),
    ],
)
def test_acks_of_what_is_not_there_are_refused(script: Script, ack: Ack) -> None:
    seeded(script, A, session=SID)
    assert codes(script.say(A, ack)) == ["bad_ack"]


@pytest.mark.parametrize("end", ["goodbye", "timeout", "replaced", "lost", "invalid"])
def test_the_result_of_a_session_that_ended_is_discarded(script: Script, end: str) -> None:
    session = seeded(script)
    script.statistic(A, session, 0, {0: (3, Y)})
    job = script.service.next_job(script.now)
    assert script.service.next_job(script.now) is None, "one at a time"
    if end == "goodbye":
        script.say(A, Goodbye(session, "done"))
    elif end == "timeout":
        beats(script, 11.0)
    elif end == "replaced":
        script.service.on_message(B, hello(SPECS, session=session), script.now)
        script.seed(B, session, 0, 3, flat(1, 1, 1))
    elif end == "lost":
        script.service.on_lost(A)
    else:
        script.say(A, ProtocolError("truncated", ""))
    assert script.finish(job) == []
    assert script.compute() == []
    if end == "replaced":
        assert script.service.sessions.of(B).store.blocks[0].newest == 3


def test_a_result_that_was_not_asked_for_is_a_bug(script: Script) -> None:
    session = seeded(script)
    script.statistic(A, session, 0, {0: (3, Y)})
    job = script.service.next_job(script.now)
    script.finish(job)
    with pytest.raises(AssertionError):
        script.finish(job)


def test_heartbeats_tell_the_busy_share_and_what_waits(script: Script) -> None:
    session = seeded(script)
    beats(script, 0.0)
    script.statistic(A, session, 0, {0: (3, Y), 1: (3, Y)})
    script.statistic(A, session, 1, {0: (3, Y)})
    script.now += 0.25
    job = script.service.next_job(script.now)
    script.now += 0.5
    script.finish(job)
    heartbeat = beats(script, 0.25)[0]
    assert heartbeat.busy == pytest.approx(0.5)
    assert heartbeat.queued == 1
    job = script.service.next_job(script.now)
    assert beats(script, 1.0)[0].busy == pytest.approx(1.0), "a job that is out counts so far"
    assert beats(script, 1.0)[0].queued == 1
    script.now += 0.5
    script.finish(job)
    assert beats(script, 0.5)[0].busy == pytest.approx(0.5)
    heartbeats = [fields for kind, fields in script.events if kind == "heartbeat"]
    assert len(heartbeats) == 4


def test_stop_says_goodbye_to_all_and_frees_the_worker(script: Script) -> None:
    first, second = seeded(script, A, owner=0), seeded(script, B, owner=1)
    out = script.service.on_stop("worker ends")
    assert out == [(A, Goodbye(first, "worker ends")), (B, Goodbye(second, "worker ends"))]
    assert isinstance(script.say(C, hello(SPECS, session=SID, job=OTHER_JOB))[0], Welcome)


def test_events_tell_the_story(script: Script) -> None:
    session = seeded(script)
    script.statistic(A, session, 0, {0: (3, Y)})
    script.compute()
    script.say(A, Goodbye(session, "done"))
    assert script.kinds_of_events() == [
        "session",
        "statistic_received",
        "refresh",
        "publish",
        "session",
    ]
    received, refresh, publish = (fields for _, fields in script.events[1:4])
    assert received == {
        "seq": 0,
        "since": 0,
        "through": 1,
        "blocks": ["one"],
        "basis": [3],
        "bytes": 1,
        "owner": 0,
    }
    assert refresh["t0"] <= refresh["t1"]
    assert (refresh["blocks"], refresh["versions"]) == (["one"], [4])
    assert (publish["based_on"], publish["bytes"]) == ([1], 16)
    assert script.events[0][1]["job"] == JOB.hex()
