"""The loop with real threads over every link: the same conversation, the same bits."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import zmq
from worker_fakes import FakeKind, fake_spec, flat
from worker_owner import (
    DEADLINE_S,
    EVERY_KIND,
    Events,
    Owner,
    refresh_directly,
    start_flat,
    statistic_flat,
)

from distcurv.curvature.kinds import KINDS
from distcurv.wire import bind, zmq_link
from distcurv.wire.messages import Ack, Error, Goodbye, Published, Statistics
from distcurv.worker import loop
from distcurv.worker.loop import run
from distcurv.worker.outbox import Outbox
from distcurv.worker.service import Service
from distcurv.worker.settings import WorkerSettings

QUICK = WorkerSettings(heartbeat=0.05, session_timeout=60.0)


class Inline:
    """A worker in a daemon thread, as in-process use has it."""

    def __init__(self, endpoint: str, settings: WorkerSettings) -> None:
        self.server = bind(endpoint)
        self.endpoint = self.server.endpoint
        self.events = Events()
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self.service = Service(settings, self.events, pid=1)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            run(self.server, self.service, stop=self.stop, emit=self.events)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.error = error

    def end(self) -> None:
        self.stop.set()
        self.server.wake()
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()


@pytest.fixture(params=["memory", "tcp", "ipc"])
def endpoint(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {
        "memory": "memory://",
        "tcp": "tcp://127.0.0.1:0",
        "ipc": f"ipc://{tmp_path}/w",
    }[request.param]


@pytest.fixture
def start(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Inline]]:
    # A Goodbye that is said must arrive, whatever the machine is busy with.
    monkeypatch.setattr(zmq_link, "LINGER_MS", 30_000)
    running: list[Inline] = []

    def begin(settings: WorkerSettings = QUICK) -> Inline:
        running.append(Inline(endpoint, settings))
        return running[-1]

    yield begin
    for worker in running:
        worker.end()


@pytest.fixture
def join() -> Iterator[Callable[..., Owner]]:
    owners: list[Owner] = []

    def make(worker: Inline, **fields: object) -> Owner:
        owners.append(Owner(worker.endpoint, **fields))  # type: ignore[arg-type]
        return owners[-1]

    yield make
    for owner in owners:
        owner.close()


class Gate:
    """Holds a refresh of the fake kind until the test lets it go on."""

    def __init__(self, kind: FakeKind, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        original = kind.refresh

        def held(*args):  # type: ignore[no-untyped-def]
            self.entered.set()
            assert self.open.wait(DEADLINE_S)
            return original(*args)

        monkeypatch.setattr(kind, "refresh", held)


def test_versions_over_a_link_equal_the_kinds_called_directly(start, join) -> None:
    """Two blocks of each kind, three versions: bit for bit, whatever carries them."""
    specs = [
        dataclasses.replace(spec, name=f"{spec.name}{copy}")
        for copy in range(2)
        for spec in EVERY_KIND
    ]
    groups = [[first, first + len(EVERY_KIND)] for first in range(len(EVERY_KIND))]
    owner = join(start())
    assert owner.open(specs).device == "cpu"
    newest = {block: start_flat(spec) for block, spec in enumerate(specs)}
    owner.seed({block: (0, tensor) for block, tensor in newest.items()})
    states: dict[int, dict[str, torch.Tensor]] = {}
    for block, spec in enumerate(specs):
        kind = KINDS[spec.kind]
        seeded = kind.seed(spec, kind.published_layout(spec).views(newest[block].unsqueeze(0)))
        states[block] = {name: value[0] for name, value in seeded.items()}
    arrived: dict[tuple[int, int], torch.Tensor] = {}  # by block and version
    for seq in range(3):
        sent = {
            block: statistic_flat(spec, newest[block], 10 * seq + block)
            for block, spec in enumerate(specs)
        }
        owner.statistic(seq, {block: (seq, tensor) for block, tensor in sent.items()})
        for blocks in groups:
            spec = specs[blocks[0]]
            refreshed, expected = refresh_directly(
                spec,
                [states[block] for block in blocks],
                [sent[block] for block in blocks],
                [newest[block] for block in blocks],
            )
            ack = owner.await_(Ack, lambda ack, blocks=blocks: sorted(ack.blocks) == blocks)
            assert ack.numbers == [seq, seq]
            while not arrived.keys() >= {(block, seq + 1) for block in blocks}:
                published = owner.await_(Published)  # what is sent anew may have several groups
                owner.acknowledge(published)
                sizes = [newest[block].numel() for block in published.blocks]
                parts = published.payload.split(sizes)
                arrived |= dict(
                    zip(zip(published.blocks, published.versions, strict=True), parts, strict=True)
                )
            for index, block in enumerate(blocks):
                assert torch.equal(arrived[block, seq + 1], expected[index]), (
                    f"seq {seq} block {block}"
                )
                newest[block] = expected[index].clone()
                states[block] = {name: value[index] for name, value in refreshed.state.items()}


def test_published_comes_again_until_acknowledged(fake_kind, start, join) -> None:
    worker = start()
    owner = join(worker)
    owner.open([fake_spec("x")])
    owner.seed({0: (0, flat(1, 1, 1, 0))})
    owner.statistic(0, {0: (0, flat(1, 2, 3, 1))})
    for _ in range(3):
        published = owner.await_(Published)
        assert torch.equal(published.payload, flat(12, 13, 14, 1))
    owner.acknowledge(published)
    owner.statistic(1, {0: (1, flat(0, 0, 0, 1))})
    assert owner.await_(Published, lambda message: message.versions != [1]).versions == [2]


def test_stop_finishes_the_job_under_way_and_says_goodbye(
    fake_kind, start, join, monkeypatch
) -> None:
    gate = Gate(fake_kind, monkeypatch)
    worker = start()
    owner = join(worker)
    owner.open([fake_spec("x"), fake_spec("y", dim=4)])
    owner.seed({0: (0, flat(1, 1, 1, 0)), 1: (0, flat(1, 1, 1, 1, 0))})
    owner.statistic(0, {0: (0, flat(1, 2, 3, 1)), 1: (0, flat(1, 2, 3, 4, 1))})
    assert gate.entered.wait(DEADLINE_S)
    worker.stop.set()
    worker.server.wake()
    gate.open.set()
    assert len(owner.await_(Ack).blocks) == 1, "only the job that had been started"
    owner.await_(Published)
    assert "stopped" in owner.await_(Goodbye).reason
    worker.thread.join(DEADLINE_S)
    assert not worker.thread.is_alive()
    assert worker.error is None
    worker.events.await_("link", state="down")


def test_heartbeats_go_on_while_a_refresh_computes(fake_kind, start, join, monkeypatch) -> None:
    gate = Gate(fake_kind, monkeypatch)
    worker = start()
    owner = join(worker)
    owner.open([fake_spec("x")])
    owner.seed({0: (0, flat(1, 1, 1, 0))})
    owner.statistic(0, {0: (0, flat(1, 2, 3, 1))})
    assert gate.entered.wait(DEADLINE_S)
    worker.events.await_("heartbeat", queued=1, busy=1.0)
    second = join(worker, owner=1)
    second.open([fake_spec("x")])  # and Hello is answered
    gate.open.set()
    owner.await_(Published)


def test_a_bug_in_a_kind_ends_the_loop_with_goodbyes(fake_kind, start, join, monkeypatch) -> None:
    def broken(*args):  # type: ignore[no-untyped-def]
        raise RuntimeError("a bug")

    monkeypatch.setattr(fake_kind, "refresh", broken)
    worker = start()
    owner = join(worker)
    owner.open([fake_spec("x")])
    owner.seed({0: (0, flat(1, 1, 1, 0))})
    owner.statistic(0, {0: (0, flat(1, 2, 3, 1))})
    assert "failed" in owner.await_(Goodbye).reason
    worker.thread.join(DEADLINE_S)
    assert isinstance(worker.error, RuntimeError)


def test_an_owner_that_never_reads_is_given_up_and_others_are_served(
    fake_kind, start, join, monkeypatch
) -> None:
    """Its queue fills with versions of 2 MiB, then acks wait; 2 s of that ends its session."""
    # Silence ends none here, and so few heartbeats fill no queue while this test has to wait.
    monkeypatch.setattr(loop, "Outbox", lambda server, patience: Outbox(server, 2.0))
    spec = fake_spec("x", dim=2**19)
    worker = start(WorkerSettings(heartbeat=2.0, session_timeout=600.0))
    deaf, other = join(worker, owner=0), join(worker, owner=1)
    deaf.open([spec])
    zeros = torch.zeros(2**19 + 1)
    deaf.seed({0: (0, zeros)})
    other.open([fake_spec("x")])
    other.seed({0: (0, flat(0, 0, 0, 0))})
    version = 0
    deadline = time.monotonic() + DEADLINE_S
    while not worker.events.seen("session", owner=0, reason="the owner does not read"):
        deaf.link.send(Statistics(deaf.session, version, 0, 0, [0], [0], zeros))
        other.statistic(version, {0: (version, flat(0, 0, 0, 1))})
        version += 1
        published = other.await_(
            Published, lambda message, version=version: message.versions == [version]
        )
        other.acknowledge(published)
        other.await_(Ack)
        assert time.monotonic() < deadline
    assert not worker.events.seen("session", owner=1, state="closed")


def test_rubbish_on_a_socket_is_refused_and_the_service_lives(fake_kind, tmp_path, join) -> None:
    worker = Inline("tcp://127.0.0.1:0", QUICK)
    try:
        owner = join(worker)
        owner.open([fake_spec("x")])
        owner.seed({0: (0, flat(1, 1, 1, 0))})
        with zmq.Context() as context, context.socket(zmq.DEALER) as raw:
            raw.linger = 0
            raw.connect(worker.endpoint)
            raw.send_multipart([b"\xc1 not msgpack", b"x" * 100])
            assert raw.poll(DEADLINE_S * 1000), "an Error is sent before it is dropped"
            assert b"error" in raw.recv_multipart()[0]
        owner.statistic(0, {0: (0, flat(1, 2, 3, 1))})
        assert owner.await_(Published).versions == [1]
    finally:
        worker.end()


def test_unknown_basis_is_told_over_the_link(fake_kind, start, join) -> None:
    owner = join(start())
    owner.open([fake_spec("x")])
    owner.statistic(0, {0: (7, flat(1, 2, 3, 1))})
    error = owner.await_(Error)
    assert (error.code, error.blocks, error.seq) == ("unknown_basis", [0], 0)
