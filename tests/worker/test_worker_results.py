"""Results, resends, heartbeats and the event log of the service core."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from worker_fakes import (
    JOB,
    OTHER_JOB,
    SID,
    SPECS,
    A,
    B,
    C,
    Script,
    Y,
    beats,
    codes,
    flat,
    hello,
    seeded,
)

from distcurv.errors import ProtocolError
from distcurv.wire.messages import (
    Ack,
    Goodbye,
    Heartbeat,
    Welcome,
)
from distcurv.worker.settings import WorkerSettings

pytestmark = pytest.mark.usefixtures("fake_kind")


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
        assert not resent.narrow.numel() and not sent.narrow.numel()
        tensors = {"payload": resent.payload, "narrow": resent.narrow}
        assert resent == dataclasses.replace(sent, **tensors)
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
