"""Block tables, recorded events and scripted workers for the tests of the training side."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from distcurv.curvature.spec import BlockSpec, SideSpec
from distcurv.train.backlog import Span
from distcurv.train.conversation import JobInfo
from distcurv.train.courier import Outgoing
from distcurv.train.depot import Depot, State
from distcurv.train.table import BlockTable
from distcurv.wire.link import ThreadOwned
from distcurv.wire.messages import Ack, Hello, Message, Published, Seed, Statistics, Welcome

DEADLINE = 60.0  # seconds; far above what a healthy run needs
M = TypeVar("M")


def block_spec(name: str = "w", dims: tuple[int, int] = (6, 4), rank: int = 2) -> BlockSpec:
    """A low-rank block with sides A (dims[0]) and G (dims[1]), sketch encoding."""
    sides = tuple(SideSpec(dim, min(rank, dim), "isotropic", "sketch") for dim in dims)
    return BlockSpec(name, "lowrank", sides, 0.9)


def make_table(count: int = 2, nodes: Sequence[int] = (0,), max_owners: int = 8) -> BlockTable:
    """A table of ``count`` equal blocks."""
    return BlockTable.make([block_spec(f"w{i}") for i in range(count)], nodes, max_owners)


class Events:
    """An event sink that keeps what it gets; safe from any thread."""

    def __init__(self) -> None:
        self.all: list[tuple[str, dict[str, object]]] = []

    def __call__(self, kind: str, /, **fields: object) -> None:
        self.all.append((kind, fields))

    def of(self, kind: str) -> list[dict[str, object]]:
        """The fields of all events of a kind."""
        return [fields for name, fields in list(self.all) if name == kind]


def wait_until(ready: Callable[[], object], what: str) -> None:
    """Wait for a condition that no event announces, at most `DEADLINE`."""
    deadline = time.monotonic() + DEADLINE
    pause = threading.Event()
    while not ready():
        assert time.monotonic() < deadline, f"waited {DEADLINE} s for {what}"
        pause.wait(0.001)


def filled_depot(table: BlockTable, emit: Callable[..., None] | None = None) -> Depot:
    """A depot with version 0 of every block."""
    depot = Depot(emit or Events())
    for block in range(len(table)):
        size = table.published_layouts[block].size
        depot.reset(block, [State(0, -1, -1, torch.full((size,), float(block)))])
    return depot


def job_info(
    table: BlockTable,
    blocks: Sequence[int] | None = None,
    *,
    heartbeat: float = 1.0,
    link_timeout: float = 5.0,
    emit: Callable[..., None] | None = None,
) -> JobInfo:
    """What a session of rank 0 says of itself."""
    return JobInfo(
        job=b"j" * 16,
        generation=0,
        owner=0,
        table=table,
        blocks=tuple(range(len(table)) if blocks is None else blocks),
        heartbeat=heartbeat,
        link_timeout=link_timeout,
        emit=emit or Events(),
    )


def outgoing(
    table: BlockTable, blocks: Sequence[int], *, since: int = 0, through: int = 4, captures: int = 2
) -> Outgoing:
    """Statistics of ones, against version 0."""
    size = sum(table.statistic_layouts[block].size for block in blocks)
    span = Span(since, through, captures)
    return Outgoing(span, list(blocks), [0] * len(blocks), torch.ones(size))


class ScriptedLink(ThreadOwned):
    """A link whose other end is a function from what is sent to what is answered.

    Args:
        answer: called with each message that is sent; what it returns is received.
        waits: whether `receive` waits for its timeout (in threads) or returns at once.
    """

    endpoint = "scripted://worker"

    def __init__(
        self,
        answer: Callable[[Message], Iterable[Message | Exception]] = lambda message: (),
        *,
        waits: bool = False,
    ) -> None:
        super().__init__()
        self.sent: list[Message] = []
        self.takes = True  # False: the queue is full
        self.closed = threading.Event()
        self._answer = answer
        self._waits = waits
        self._incoming: queue.SimpleQueue[Message | Exception | None] = queue.SimpleQueue()

    def send(self, message: Message) -> bool:
        self.enter()
        if not self.takes:
            return False
        self.sent.append(message)
        self.say(*self._answer(message))
        return True

    def say(self, *messages: Message | Exception) -> None:
        """Let the owner receive these; an exception is raised there."""
        for message in messages:
            self._incoming.put(message)

    def receive(self, timeout: float) -> Message | None:
        self.enter()
        try:
            item = self._incoming.get(self._waits, timeout)
        except queue.Empty:
            return None
        if isinstance(item, Exception):
            raise item
        return item

    def wake(self) -> None:
        self._incoming.put(None)

    def close(self) -> None:
        self.enter()
        self.closed.set()

    def sent_of(self, kind: type[M]) -> list[M]:
        """All messages of a kind that were sent."""
        return [m for m in list(self.sent) if isinstance(m, kind)]


class HonestWorker:
    """Answers as a worker does: welcomes, folds each statistic to the next version of ones.

    ``speaks`` can be set to False: then statistics are taken and never answered."""

    def __init__(self, table: BlockTable) -> None:
        self._table = table
        self._blocks: list[int] = []
        self.versions: dict[int, int] = {}
        self.speaks = True

    def __call__(self, message: Message) -> list[Message | Exception]:
        if isinstance(message, Hello):
            names = [spec.name for spec in self._table.specs]
            self._blocks = [names.index(str(fields["name"])) for fields in message.blocks]
            return [Welcome(message.session, 1, "cpu")]
        if isinstance(message, Seed):
            for block, version in zip(message.blocks, message.versions, strict=True):
                self.versions[block] = version
        if isinstance(message, Statistics) and self.speaks:
            return [self.ack(message), self.publish(message)]
        return []

    def ack(self, message: Statistics) -> Ack:
        return Ack(message.session, "statistics", message.blocks, [message.seq])

    def publish(self, message: Statistics) -> Published:
        for block in message.blocks:
            self.versions[block] += 1
        versions = [self.versions[block] for block in message.blocks]
        sizes = [self._table.published_layouts[self._blocks[b]].size for b in message.blocks]
        return published(message, versions, torch.ones(sum(sizes)))


def published(
    statistics: Statistics, versions: list[int], payload: Tensor, *, session: bytes | None = None
) -> Published:
    """A worker's answer to a statistic."""
    blocks = statistics.blocks
    return Published(
        session=statistics.session if session is None else session,
        blocks=blocks,
        versions=versions,
        based_on=[statistics.through] * len(blocks),
        seqs=[statistics.seq] * len(blocks),
        uncaptured=[0.0] * len(blocks),
        innovation=[0.0] * len(blocks),
        seconds=0.0,
        payload=payload,
    )
