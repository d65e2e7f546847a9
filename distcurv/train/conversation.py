"""The owner's side of one session: greeting, seeds, statistics, results, signs of life.

It is driven by the courier's thread and knows no threads itself.  A session that breaks a rule or
falls silent raises `SessionLost`; the courier then drops what was in flight and tries anew.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from distcurv.curvature.narrow import Sent, join, sent_sizes, settled
from distcurv.errors import DistcurvError
from distcurv.train.depot import Depot, State
from distcurv.train.table import BlockTable
from distcurv.wire.link import Link
from distcurv.wire.messages import (
    NOTHING,
    PROTOCOL,
    Ack,
    Error,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    Published,
    Seed,
    Statistics,
    Welcome,
)

if TYPE_CHECKING:
    from distcurv.train.courier import Outgoing

log = logging.getLogger("distcurv.train")

_SEED_CHUNK = 32 << 20  # bytes per Seed message
_DROPS = ("unknown_basis", "non_finite", "refresh_failed", "overrun", "bad_statistic")


class SessionLost(DistcurvError):
    """The session is over; a new one has to be opened."""


@dataclass(frozen=True)
class JobInfo:
    """What a session says of its job.  ``blocks`` are this link's blocks in the table."""

    job: bytes
    generation: int
    owner: int
    table: BlockTable
    blocks: tuple[int, ...]
    heartbeat: float
    link_timeout: float
    emit: Callable[..., None]


@dataclass
class Parcel:
    """Statistics under a sequence number, on their way through the courier.

    ``seeds`` are the states that a worker needs which does not know a block yet."""

    seq: int
    out: Outgoing
    seeds: dict[int, list[State]] = field(repr=False)
    sent: Sent = field(default=Sent(torch.empty(0), NOTHING), repr=False)
    fetched: bool = False


class Conversation:
    """One session over one link.  Belongs to the courier's thread."""

    def __init__(self, link: Link, job: JobInfo, depot: Depot, route: str) -> None:
        self.link = link
        self.session = os.urandom(16)
        self.open = False
        self.busy = 0.0
        self._job = job
        self._depot = depot
        self._route = route
        self._local = {block: i for i, block in enumerate(job.blocks)}
        self._seeded: set[int] = set()
        self._hello_sent = False
        self._congested = False
        self._last_seq = -1
        self._unsent: list[Message] = []
        self._heard = -1.0
        self._spoke = -1.0

    def forget_seeds(self, blocks: Iterable[int]) -> None:
        """Blocks that another route has served meanwhile: seed them before the next statistic."""
        self._seeded.difference_update(blocks)

    # -- sending --------------------------------------------------------------------------

    def goodbye(self) -> None:
        """End on purpose; a link that cannot take the message is simply closed."""
        if self.open:
            self.link.send(Goodbye(self.session, "training closed"))

    def send_statistics(self, parcel: Parcel) -> bool:
        """Seed what is not seeded, then send.  False when the link is full: call again."""
        out = parcel.out
        self._congested = True
        if not self._send_seeds(parcel):
            return False
        message = Statistics(
            session=self.session,
            seq=parcel.seq,
            since=out.span.since,
            through=out.span.through,
            blocks=[self._local[b] for b in out.blocks],
            basis=out.basis,
            payload=parcel.sent.payload,
            narrow=parcel.sent.narrow,
        )
        self._congested = not self.link.send(message)
        if not self._congested:
            self._last_seq = parcel.seq
        return not self._congested

    def _send_seeds(self, parcel: Parcel) -> bool:
        queue = [
            (block, state)
            for block in parcel.out.blocks
            if block not in self._seeded
            for state in parcel.seeds[block]
        ]
        while queue:
            chunk: list[tuple[int, State]] = []
            nbytes = 0
            # All versions of a block travel together: a block is seeded or it is not.
            while queue and (nbytes < _SEED_CHUNK or chunk[-1][0] == queue[0][0]):
                chunk.append(queue.pop(0))
                nbytes += 4 * chunk[-1][1].flat.numel()
            message = Seed(
                session=self.session,
                blocks=[self._local[block] for block, _ in chunk],
                versions=[state.version for _, state in chunk],
                based_on=[state.through for _, state in chunk],
                payload=torch.cat([state.flat for _, state in chunk]),
            )
            if not self.link.send(message):
                return False
            self._seeded.update(block for block, _ in chunk)
        return True

    # -- one turn -------------------------------------------------------------------------

    def pump(self, now: float) -> None:
        """Greet, keep alive, and handle what comes within a heartbeat's time."""
        if self._heard < 0:
            self._heard = self._spoke = now
        silent = now - self._heard > self._job.link_timeout
        if not self._hello_sent:
            self._hello_sent = self.link.send(self._hello())
        if self.open and now - self._spoke >= self._job.heartbeat:
            self._spoke = now
            self.link.send(Heartbeat(self.session, 0.0, 0))
        while self._unsent and self.link.send(self._unsent[0]):
            self._unsent.pop(0)
        # Where the link cannot take a message yet, look again soon.
        waiting = not self._hello_sent or self._congested or bool(self._unsent)
        patience = 0.02 if waiting else self._job.heartbeat / 2
        # Where this process was held up, the worker's words may have been waiting all the time.
        message = self.link.receive(0.0 if silent else patience)
        if message is not None:
            self._heard = max(self._heard, now)
            self._handle(message)
        elif silent:
            raise SessionLost(
                f"nothing heard for {self._job.link_timeout:g} s"
                + ("" if self.open else " (no worker answered)")
            )

    def _hello(self) -> Hello:
        table = self._job.table
        return Hello(
            protocol=PROTOCOL,
            job=self._job.job,
            session=self.session,
            generation=self._job.generation,
            owner=self._job.owner,
            table_hash=table.digest,
            blocks=[table.specs[block].to_fields() for block in self._job.blocks],
        )

    def _handle(self, message: Message) -> None:
        unattributed = isinstance(message, Error) and not message.session
        if message.session != self.session and not unattributed:
            log.debug("message of another session ignored: %s", type(message).__name__)
            return
        if isinstance(message, Welcome):
            self.open = True
        elif isinstance(message, Heartbeat):
            self.busy = message.busy
        elif isinstance(message, Published):
            self._take(message)
        elif isinstance(message, Error):
            self._refused(message)
        elif isinstance(message, Goodbye):
            raise SessionLost(f"worker said goodbye: {message.reason}")
        elif not isinstance(message, Ack):
            raise SessionLost(f"worker sent {type(message).__name__}, which only owners send")

    def _refused(self, message: Error) -> None:
        if message.code not in _DROPS:
            raise SessionLost(f"worker refused: {message.code}: {message.text}")
        blocks = self._globals(message.blocks)
        log.warning("worker refused statistics of %d blocks: %s", len(blocks), message.text)
        self._depot.count(refresh_failures=len(blocks))
        self._depot.drop_in_flight(
            message.code, session=self.session, seq=message.seq, blocks=blocks
        )
        if message.code == "unknown_basis":
            self.forget_seeds(blocks)

    def _globals(self, local: Sequence[int]) -> list[int]:
        if any(not 0 <= i < len(self._job.blocks) for i in local):
            raise SessionLost(f"worker named blocks {list(local)} of {len(self._job.blocks)}")
        return [self._job.blocks[i] for i in local]

    def _take(self, message: Published) -> None:
        blocks = self._globals(message.blocks)
        layouts = [self._job.table.published_layouts[block] for block in blocks]
        sent = Sent(message.payload, message.narrow)
        got = [(tensor.numel(), tensor.dtype) for tensor in sent]
        wide, narrow = sent_sizes(layouts)
        if got != [(wide, torch.float32), (narrow, torch.float16)]:
            told = " and ".join(f"{count} {dtype}" for count, dtype in got)
            raise SessionLost(
                f"a preconditioner of {told} numbers came for blocks that need {wide} float32 and "
                f"{narrow} float16 numbers"
            )
        taken: list[int] = []
        parts = zip(blocks, layouts, join(layouts, sent), strict=True)
        for i, (block, layout, part) in enumerate(parts):
            flat = settled(layout, part)
            seq, version = message.seqs[i], message.versions[i]
            if seq > self._last_seq:
                raise SessionLost(f"worker answered statistic {seq}, sent were {self._last_seq}")
            if not bool(torch.isfinite(flat).all()):
                self._depot.count(rejected=1)
                self._depot.drop_in_flight(
                    "non-finite preconditioner", session=self.session, seq=seq, blocks=[block]
                )
                self.forget_seeds([block])
            elif self._depot.accept(block, self.session, seq, version, flat, self._route):
                taken.append(i)
            elif self._depot.drop_in_flight(
                f"version {version} is not the next", session=self.session, seq=seq, blocks=[block]
            ):
                self._depot.count(rejected=1)
                self.forget_seeds([block])
        nbytes = sent.nbytes
        if self._route == "worker":
            self._depot.count(bytes_in=nbytes)
        if taken:
            self._job.emit(
                "published_received",
                blocks=[blocks[i] for i in taken],
                versions=[message.versions[i] for i in taken],
                bytes=nbytes,
            )
        # Acknowledged also where refused: a repeat must not be resent for ever.
        self._unsent.append(Ack(self.session, "published", message.blocks, message.versions))
