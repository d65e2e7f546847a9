"""The courier's thread: links that hang, fail or come back, and the training thread kept out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from train_rig import (
    DEADLINE,
    Events,
    HonestWorker,
    ScriptedLink,
    filled_depot,
    job_info,
    make_table,
    outgoing,
    wait_until,
)

from distcurv.errors import LinkError, ProtocolError
from distcurv.train.courier import Courier
from distcurv.wire import Link
from distcurv.wire.messages import Error, Goodbye, Hello, Message, Seed, Statistics


class Rig:
    """A courier over links that a test makes."""

    def __init__(self) -> None:
        self.events = Events()
        self.table = make_table(2)
        self.depot = filled_depot(self.table, self.events)
        self.worker = HonestWorker(self.table)
        self.links: list[ScriptedLink] = []
        self.connect: Callable[[], Link] = self.honest_link
        self.released = threading.Event()
        self.courier: Courier | None = None

    def honest_link(self) -> ScriptedLink:
        self.links.append(ScriptedLink(self.worker, waits=True))
        return self.links[-1]

    def start(self, *, link_timeout: float = 600.0) -> Courier:
        job = job_info(self.table, heartbeat=0.05, link_timeout=link_timeout, emit=self.events)
        self.courier = Courier(
            lambda: self.connect(), job, self.depot, "worker", self.events, "worker under test"
        )
        self.courier.start()
        return self.courier

    def opened(self, **settings: float) -> Courier:
        courier = self.start(**settings)
        self.wait(lambda: courier.up)
        return courier

    def wait(self, ready: Callable[[], object]) -> None:
        assert self.depot.wait(lambda: bool(ready()), DEADLINE)

    def version(self, block: int) -> int:
        return self.depot.states(block)[-1].version


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.released.set()
    if rig.courier is not None:
        rig.courier.stop()
        assert rig.courier.join(DEADLINE)


def test_statistics_become_versions(rig: Rig) -> None:
    courier = rig.opened()
    assert courier.offer(outgoing(rig.table, [0, 1]))
    rig.wait(lambda: rig.version(0) == rig.version(1) == 1)
    rig.wait(lambda: rig.depot.in_flight_steps() == 0)
    (sent,) = rig.events.of("statistic_sent")
    assert (sent["seq"], sent["since"], sent["through"], sent["blocks"]) == (0, 0, 4, [0, 1])
    assert rig.depot.counts.sent == 1
    assert (
        rig.depot.counts.bytes_out
        == sent["bytes"]
        == 4 * outgoing(rig.table, [0, 1]).payload.numel()
    )
    assert rig.depot.counts.folded == 4


def test_nothing_is_offered_without_a_session(rig: Rig) -> None:
    def refuse() -> Link:
        raise LinkError("no way")

    rig.connect = refuse
    courier = rig.start()
    assert not courier.offer(outgoing(rig.table, [0]))
    assert rig.depot.in_flight(0) is None
    wait_until(lambda: "no way" in courier.last_error, "the error of connect")
    assert not courier.up


def test_the_link_is_entered_by_the_courier_alone(rig: Rig) -> None:
    rig.opened()
    with pytest.raises(LinkError, match="belongs to thread"):
        rig.links[0].send(Goodbye(b"s" * 16, "from the training thread"))
    with pytest.raises(LinkError, match="only its I/O thread may"):
        rig.links[0].receive(0.0)


def test_a_new_session_begins_after_an_end(rig: Rig) -> None:
    courier = rig.opened()
    rig.worker.speaks = False
    assert courier.offer(outgoing(rig.table, [0, 1]))
    wait_until(lambda: rig.links[0].sent_of(Statistics), "the statistic to leave")
    (hello,) = rig.links[0].sent_of(Hello)
    rig.links[0].say(Error(hello.session, "busy", "another job"))
    rig.wait(lambda: courier.sessions == 2 and courier.up)
    assert rig.links[0].closed.is_set()
    assert rig.depot.counts.dropped == 4
    states = [(e["state"], e["reason"]) for e in rig.events.of("link")]
    assert states == [("up", ""), ("down", "worker refused: busy: another job"), ("up", "")]

    rig.worker.speaks = True
    assert courier.offer(outgoing(rig.table, [0, 1]))
    rig.wait(lambda: rig.version(0) == 1)
    assert len(rig.links[1].sent_of(Seed)) == 1
    assert rig.links[1].sent_of(Statistics)[0].seq == 0


@pytest.mark.parametrize(
    "broken", [ProtocolError("bad", "bytes"), OSError("gone"), ZeroDivisionError("a bug")]
)
def test_whatever_a_link_raises_ends_the_session_not_the_thread(
    rig: Rig, broken: Exception
) -> None:
    courier = rig.opened()
    rig.links[0].say(broken)
    rig.wait(lambda: courier.sessions == 2 and courier.up)
    (down,) = [e for e in rig.events.of("link") if e["state"] == "down"]
    assert type(broken).__name__ in str(down["reason"])


def test_silence_ends_the_session_and_drops_what_is_in_flight(rig: Rig) -> None:
    rig.worker.speaks = False
    courier = rig.opened(link_timeout=0.3)
    offered = 0
    while not offered:  # the session may just have ended
        offered = courier.offer(outgoing(rig.table, [0]))
    rig.wait(lambda: rig.depot.counts.dropped == 2)
    rig.wait(lambda: courier.sessions >= 2)
    assert any("nothing heard" in str(e["reason"]) for e in rig.events.of("link"))


def test_a_full_link_keeps_the_statistic_until_it_is_taken(rig: Rig) -> None:
    courier = rig.opened()
    rig.links[0].takes = False
    assert courier.offer(outgoing(rig.table, [0]))
    assert courier.offer(outgoing(rig.table, [1]))
    assert rig.links[0].sent_of(Statistics) == []
    rig.links[0].takes = True
    rig.wait(lambda: rig.version(0) == rig.version(1) == 1)
    assert [s.seq for s in rig.links[0].sent_of(Statistics)] == [0, 1]


def test_withdrawing_drops_unsent_statistics_and_seeds_anew(rig: Rig) -> None:
    courier = rig.opened()
    assert courier.offer(outgoing(rig.table, [0, 1]))
    rig.wait(lambda: rig.version(0) == rig.version(1) == 1)
    rig.links[0].takes = False
    assert courier.offer(outgoing(rig.table, [0]))
    courier.withdraw([0], "route switched")
    assert rig.depot.in_flight(0) is None
    assert rig.depot.counts.dropped == 2
    rig.links[0].takes = True
    assert courier.offer(outgoing(rig.table, [0, 1]))
    rig.wait(lambda: rig.version(1) == 2)
    rig.wait(lambda: rig.version(0) == 2)
    assert set(rig.links[0].sent_of(Seed)[-1].blocks) == {0}


def test_withdrawing_without_a_session_is_nothing(rig: Rig) -> None:
    rig.connect = lambda: (_ for _ in ()).throw(OSError("down"))
    rig.start().withdraw([0, 1], "route switched")
    assert rig.depot.counts.dropped == 0


def test_stopping_says_goodbye_and_counts_what_is_left(rig: Rig) -> None:
    rig.worker.speaks = False
    courier = rig.opened()
    assert courier.offer(outgoing(rig.table, [0, 1]))
    wait_until(lambda: rig.links[0].sent_of(Statistics), "the statistic to leave")
    courier.stop()
    assert courier.join(DEADLINE)
    assert isinstance(rig.links[0].sent[-1], Goodbye)
    assert rig.links[0].closed.is_set()
    assert not courier.up
    assert rig.depot.in_flight_steps() == 0
    assert rig.depot.counts.dropped == 4
    assert not courier.offer(outgoing(rig.table, [0]))


def test_stopping_does_not_wait_for_the_back_off(rig: Rig) -> None:
    rig.connect = lambda: (_ for _ in ()).throw(OSError("down"))
    courier = rig.start()
    wait_until(lambda: courier.last_error, "the first attempt")
    courier.stop()
    assert courier.join(DEADLINE)


class HangingLink(ScriptedLink):
    """Blocks for ever in ``send`` or ``receive`` once a session is open, until released."""

    def __init__(self, worker: HonestWorker, where: str, released: threading.Event) -> None:
        super().__init__(worker, waits=True)
        self.hangs = threading.Event()
        self._where = where
        self._released = released

    def _hang(self) -> None:
        self.hangs.set()
        self._released.wait()
        raise OSError("released")

    def send(self, message: Message) -> bool:
        if self._where == "send" and not isinstance(message, Hello):
            self._hang()
        return super().send(message)

    def receive(self, timeout: float) -> Message | None:
        if self._where == "receive" and self.sent_of(Statistics):
            self._hang()
        return super().receive(timeout)


@pytest.mark.parametrize("where", ["send", "receive"])
def test_a_link_that_hangs_for_ever_holds_nobody_else(rig: Rig, where: str) -> None:
    rig.worker.speaks = False
    link = HangingLink(rig.worker, where, rig.released)
    rig.connect = lambda: link
    courier = rig.opened()
    assert courier.offer(outgoing(rig.table, [0]))
    assert link.hangs.wait(DEADLINE)
    # None of these may wait for the link: the test's time-out is the watchdog.
    for _ in range(100):
        courier.offer(outgoing(rig.table, [1]))
        courier.withdraw([1], "again")
    courier.stop()
    assert not courier.join(0.05)
    (thread,) = [t for t in threading.enumerate() if t.name == "distcurv-worker under test"]
    assert thread.daemon


def test_a_connect_that_hangs_for_ever_holds_nobody_else(rig: Rig) -> None:
    entered = threading.Event()

    def hang() -> Link:
        entered.set()
        rig.released.wait()
        raise OSError("released")

    rig.connect = hang
    courier = rig.start()
    assert entered.wait(DEADLINE)
    assert not courier.offer(outgoing(rig.table, [0]))
    courier.stop()
    assert not courier.join(0.05)


def test_a_courier_that_never_started_has_ended(rig: Rig) -> None:
    job = job_info(rig.table)
    courier = Courier(rig.honest_link, job, rig.depot, "worker", rig.events, "idle")
    courier.stop()
    assert courier.join(0.0)
