"""Who may use a worker: one job at a time, side by side sessions of its owners.  No I/O.

The rules, as a table of what a `Hello` meets:

| active                              | answer                                          |
|-------------------------------------|-------------------------------------------------|
| nothing                             | a session                                       |
| the same session, same peer         | the session that is there (Hello was repeated)  |
| same job and generation, this owner | replaces this owner's session                   |
| same job and generation, others     | one more session, if the table hash is theirs   |
| same job, an older generation       | ends all its sessions                           |
| same job, a newer generation        | refused, ``old_generation``                     |
| another job                         | refused, ``busy``                               |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from distcurv.errors import ProtocolError
from distcurv.wire.messages import PROTOCOL, Hello
from distcurv.worker.settings import WorkerSettings
from distcurv.worker.store import BlockStore
from distcurv.worker.table import claimed_bytes, read_table


@dataclass
class Session:
    """One owner's session.  ``heard`` is when its owner last said anything, in seconds."""

    ordinal: int  # unique in a worker's life, so that a late result finds only its own session
    peer: bytes
    hello: Hello
    store: BlockStore
    claimed: int  # bytes, worst case
    heard: float
    last_seq: int = -1

    @property
    def id(self) -> bytes:
        """The 16 bytes that every message of this session carries."""
        return self.hello.session


@dataclass(frozen=True)
class Admission:
    """A session that stands, whether it is new, and which sessions made way for it."""

    session: Session
    opened: bool
    replaced: tuple[Session, ...]


class Sessions:
    """The active sessions.  When the last one ends, the worker is free for another job."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self._by_peer: dict[bytes, Session] = {}
        self._opened = 0

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._by_peer.values()))

    def of(self, peer: bytes) -> Session | None:
        """The session of a peer."""
        return self._by_peer.get(peer)

    def numbered(self, ordinal: int) -> Session | None:
        """The session with this ordinal, unless it has ended."""
        return next((entry for entry in self if entry.ordinal == ordinal), None)

    def end(self, session: Session) -> None:
        """Forget a session and everything in it."""
        if self._by_peer.get(session.peer) is session:
            del self._by_peer[session.peer]

    def silent(self, now: float) -> list[Session]:
        """Sessions of which nothing was heard for the session timeout."""
        return [entry for entry in self if now - entry.heard > self.settings.session_timeout]

    def admit(self, peer: bytes, hello: Hello, now: float) -> Admission:
        """Open a session, or raise `ProtocolError` with the code of the refusal."""
        present = self._by_peer.get(peer)
        if present is not None and present.id == hello.session:
            return Admission(present, opened=False, replaced=())
        replaced = self._replaced(peer, hello)
        others = [entry for entry in self if entry not in replaced]
        for other in others:
            if other.hello.table_hash != hello.table_hash:
                raise ProtocolError(
                    "table_mismatch",
                    f"owner {hello.owner} and owner {other.hello.owner} of this job have "
                    "different block tables: all ranks must build the same model and settings",
                )
        room = self.settings.max_blocks - sum(len(other.store.blocks) for other in others)
        specs = read_table(hello.blocks, room)
        claimed = claimed_bytes(specs, self.settings)
        taken = sum(other.claimed for other in others)
        if claimed + taken > self.settings.max_memory:
            raise ProtocolError(
                "too_large",
                f"the blocks may need {claimed} bytes, {taken} are promised to other owners and "
                f"this worker's limit is {self.settings.max_memory}: raise its max_memory, lower "
                "the rank, or use more workers",
            )
        session = Session(
            ordinal=self._opened,
            peer=peer,
            hello=hello,
            store=BlockStore(specs, self.settings),
            claimed=claimed,
            heard=now,
        )
        self._opened += 1
        for entry in replaced:
            self.end(entry)
        self._by_peer[peer] = session
        return Admission(session, opened=True, replaced=tuple(replaced))

    def _replaced(self, peer: bytes, hello: Hello) -> list[Session]:
        """The sessions that make way for this Hello; raises where it must not come in."""
        if hello.protocol != PROTOCOL:
            raise ProtocolError(
                "protocol",
                f"owner {hello.owner} speaks protocol {hello.protocol}, this worker {PROTOCOL}: "
                "install the same version of distcurv on both",
            )
        for entry in self:
            if entry.hello.job != hello.job:
                raise ProtocolError(
                    "busy",
                    f"this worker serves job {entry.hello.job.hex()}: try again when it has ended",
                )
            if entry.hello.generation > hello.generation:
                raise ProtocolError(
                    "old_generation",
                    f"generation {hello.generation} of this job was replaced by "
                    f"{entry.hello.generation}",
                )
        return [
            entry
            for entry in self
            if entry.hello.generation < hello.generation
            or entry.hello.owner == hello.owner
            or entry.peer == peer
        ]
