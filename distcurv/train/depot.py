"""What an owner's training thread and its I/O threads share: states, what is in flight, counts.

The training thread only ever takes this lock for a moment; the I/O threads never hold it while
they touch a link.  One rule decides what is believed: a version is accepted only as the answer to
the statistic that is in flight for its block, from the session it was sent in, with the next
version number.  Everything else (late answers of a lost session, repeats) is refused.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from torch import Tensor

_LOST_KEPT = 32  # more than windows between a statistic and its install


@dataclass(frozen=True)
class State:
    """One version of a block: a flat float32 CPU tensor of its published layout.

    ``since`` and ``through`` are the first and last training step folded by this version
    (``through`` is its based_on step, -1 for version 0)."""

    version: int
    since: int
    through: int
    flat: Tensor = field(repr=False)
    route: str = "inline"


@dataclass(frozen=True)
class InFlight:
    """A statistic that was handed to a session and is not answered yet."""

    session: bytes
    seq: int
    since: int
    through: int
    captures: int


@dataclass
class Counts:
    """Running totals of one owner, in units of (block, statistic step) unless said otherwise."""

    observed: int = 0
    sent: int = 0  # Statistics messages
    folded: int = 0
    dropped: int = 0
    bytes_out: int = 0  # payload bytes to worker processes
    bytes_in: int = 0  # payload bytes from worker processes
    from_workers: int = 0  # versions
    inline: int = 0  # versions
    refresh_failures: int = 0
    rejected: int = 0  # versions refused at the owner


class Depot:
    """Shared state of one owner.  All methods are safe from any thread and return at once,
    except `wait`."""

    def __init__(self, emit: Callable[..., None]) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._states: dict[int, list[State]] = {}
        self._in_flight: dict[int, InFlight] = {}
        self._lost: dict[int, collections.deque[int]] = {}
        self._emit = emit
        self.counts = Counts()

    # -- states ---------------------------------------------------------------------------

    def reset(self, block: int, states: list[State]) -> None:
        """Replace a block's states (start and load_state_dict), oldest first."""
        with self._changed:
            self._states[block] = list(states)
            self._changed.notify_all()

    def states(self, block: int) -> list[State]:
        """The block's states, oldest first."""
        with self._changed:
            return list(self._states[block])

    def share(self, block: int, version: int, flat: Tensor) -> None:
        """Keep a version in a tensor of the same numbers that lives anyway."""
        with self._changed:
            self._states[block] = [
                replace(s, flat=flat) if s.version == version else s for s in self._states[block]
            ]

    def prune(self, block: int, version: int) -> None:
        """Forget versions older than ``version``: no statistic against them can come."""
        with self._changed:
            kept = [s for s in self._states[block] if s.version >= version]
            if kept:
                self._states[block] = kept

    # -- in flight ------------------------------------------------------------------------

    def depart(self, blocks: Iterable[int], flight: InFlight) -> None:
        """Note that a statistic of these blocks was handed to a session."""
        with self._changed:
            for block in blocks:
                self._in_flight[block] = flight

    def in_flight(self, block: int) -> InFlight | None:
        """What is in flight for a block."""
        with self._changed:
            return self._in_flight.get(block)

    def accept(
        self, block: int, session: bytes, seq: int, version: int, flat: Tensor, route: str
    ) -> bool:
        """Take a new version if it answers what is in flight; says whether it was taken."""
        with self._changed:
            flight = self._in_flight.get(block)
            expected = self._states[block][-1].version + 1
            if (
                flight is None
                or (flight.session, flight.seq) != (session, seq)
                or version != expected
            ):
                return False
            del self._in_flight[block]
            self._states[block].append(State(version, flight.since, flight.through, flat, route))
            self.counts.folded += flight.captures
            if route == "worker":
                self.counts.from_workers += 1
            else:
                self.counts.inline += 1
            self._changed.notify_all()
            return True

    def drop_in_flight(
        self,
        reason: str,
        *,
        session: bytes,
        seq: int | None = None,
        blocks: Iterable[int] | None = None,
    ) -> int:
        """Give up what is in flight in a session; counted and logged as dropped.

        Returns how many (block, statistic step) were lost."""
        with self._changed:
            lost: dict[int, int] = {}
            for block in list(self._in_flight) if blocks is None else list(blocks):
                flight = self._in_flight.get(block)
                if flight is None or flight.session != session:
                    continue
                if seq is not None and flight.seq != seq:
                    continue
                lost[block] = flight.captures
                del self._in_flight[block]
            self.counts.dropped += sum(lost.values())
            self._changed.notify_all()
        if lost:
            self._emit("dropped", blocks=sorted(lost), steps=sum(lost.values()), reason=reason)
        return sum(lost.values())

    def lose_session(self, session: bytes, reason: str) -> None:
        """Drop what is in flight in a session that broke off, and remember which steps it was."""
        with self._changed:
            for block, flight in self._in_flight.items():
                if flight.session == session:
                    kept = self._lost.setdefault(block, collections.deque(maxlen=_LOST_KEPT))
                    kept.append(flight.through)
        self.drop_in_flight(reason, session=session)

    def lost(self, block: int, through: int) -> bool:
        """Whether a broken session took the statistic through this step along."""
        with self._changed:
            return through in self._lost.get(block, ())

    def drop(self, blocks: list[int], captures: int, reason: str) -> None:
        """Count statistics as dropped that never left this rank."""
        if captures and blocks:
            with self._changed:
                self.counts.dropped += captures * len(blocks)
            self._emit("dropped", blocks=blocks, steps=captures * len(blocks), reason=reason)

    def in_flight_steps(self) -> int:
        """How many (block, statistic step) are in flight."""
        with self._changed:
            return sum(flight.captures for flight in self._in_flight.values())

    def count(self, **increments: int) -> None:
        """Add to the running totals by name."""
        with self._changed:
            for name, increment in increments.items():
                setattr(self.counts, name, getattr(self.counts, name) + increment)

    # -- waiting --------------------------------------------------------------------------

    def notify(self) -> None:
        """Make waiters look again."""
        with self._changed:
            self._changed.notify_all()

    def wait(self, ready: Callable[[], bool], timeout: float) -> bool:
        """Wait until ``ready()`` (which may read this depot), at most ``timeout`` seconds.

        Only the modes that may wait come here: deterministic and in-process refreshes."""
        deadline = time.monotonic() + timeout
        while True:
            with self._changed:
                if ready():
                    return True
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, 1.0))
