"""Who may use a worker, message by message: greetings, replacements, refusals of tables."""

from __future__ import annotations

import dataclasses

import pytest
from worker_fakes import (
    OTHER_JOB,
    SID,
    SPECS,
    A,
    B,
    C,
    Script,
    Y,
    codes,
    fake_spec,
    flat,
    hello,
    seeded,
)

from distcurv.curvature.spec import BlockSpec, SideSpec
from distcurv.errors import ProtocolError
from distcurv.wire.messages import (
    PROTOCOL,
    Ack,
    Error,
    Goodbye,
    Heartbeat,
    Message,
    Seed,
    Statistics,
    Welcome,
)
from distcurv.worker.settings import WorkerSettings

pytestmark = pytest.mark.usefixtures("fake_kind")


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
    assert codes(script.say(A, hello(SPECS, session=SID, protocol=PROTOCOL + 1))) == ["protocol"]


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


FIELDS = fake_spec("x").to_fields()
UNIT = {"dim": 3, "rank": 0, "tail": "diagonal", "encoding": "unit", "units": 1}
ROWS = {"dim": 3, "rank": 3, "tail": "none", "encoding": "dense", "units": 2}
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
        ([{**FIELDS, "decay": 1.1}], "bad_table"),
        ([{**FIELDS, "power": 0.0}], "bad_table"),
        ([{**FIELDS, "power": "half"}], "bad_table"),
        ([{**FIELDS, "kind": "lowrank", "power": 0.5}], "bad_table"),
        ([{**FIELDS, "decay": float("nan")}], "bad_table"),
        ([{**FIELDS, "damping": -1.0}], "bad_table"),
        ([{**FIELDS, "damping": True}], "bad_table"),
        ([{**FIELDS, "relative_damping": 1}], "bad_table"),
        ([{**FIELDS, "max_itr": 10_001}], "bad_table"),
        ([{**FIELDS, "max_itr": 1.5}], "bad_table"),
        ([{**FIELDS, "tolerance": float("nan")}], "bad_table"),
        ([{**FIELDS, "wire_dtype": "bfloat16"}], "bad_table"),
        ([{**FIELDS, "wire_dtype": 16}], "bad_table"),
        ([{**FIELDS, "sides": []}], "bad_table"),
        ([{**FIELDS, "sides": "A"}], "bad_table"),
        ([{**FIELDS, "sides": [3]}], "bad_table"),
        ([{**FIELDS, "sides": FIELDS["sides"] * 9}], "bad_table"),
        ([{**FIELDS, "sides": [{**FIELDS["sides"][0], "rank": 4}]}], "bad_table"),
        ([{**FIELDS, "sides": [{**FIELDS["sides"][0], "dim": 0}]}], "bad_table"),
        ([{**FIELDS, "sides": [{**FIELDS["sides"][0], "dim": 2.0}]}], "bad_table"),
        ([{**FIELDS, "sides": [{**FIELDS["sides"][0], "tail": "curly"}]}], "bad_table"),
        ([{**FIELDS, "kind": "dense"}], "bad_table"),  # dense needs the dense encoding
        ([{**FIELDS, "sides": [{**FIELDS["sides"][0], "rank": 0}]}], "bad_table"),
        ([{**FIELDS, "sides": [{**UNIT, "rank": 1}]}], "bad_table"),
        ([{**FIELDS, "kind": "unitwise", "sides": [UNIT, UNIT]}], "bad_table"),
        ([{**FIELDS, "kind": "diagonal", "sides": [UNIT]}], "bad_table"),
        ([{**FIELDS, "kind": "unitwise"}], "bad_table"),
        ([{**FIELDS, "kind": "lowrank", "sides": [UNIT]}], "bad_table"),
        ([{**FIELDS, "kind": "unit_rows", "sides": [{**ROWS, "units": 0}]}], "bad_table"),
        ([{**FIELDS, "kind": "unit_rows", "sides": [{**UNIT, "units": 2}]}], "bad_table"),
        ([{**FIELDS, "kind": "unit_rows", "sides": [{**ROWS, "units": 2**40}]}], "too_large"),
        (
            [
                {
                    **FIELDS,
                    "kind": "unit_rows",
                    "sides": [{**ROWS, "dim": 2**12, "rank": 2**12, "units": 2**12}],
                }
            ],
            "too_large",
        ),
        ([{**FIELDS, "kind": "unit_rows", "sides": [ROWS, ROWS]}], "bad_table"),
        ([{**FIELDS, "kind": "layer_wise", "sides": [ROWS]}], "bad_table"),
        ([{**FIELDS, "kind": "kfe", "sides": [{**ROWS, "units": 1}]}], "bad_table"),
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
