"""The courier: one daemon thread that carries one link's messages, so that step() never does.

The training thread leaves statistics with `offer` and reads results from the `Depot`; it never
touches the link (the link asserts it).  A link that hangs for ever therefore hangs this thread
alone.  The conversation itself is `Conversation`'s; here are the thread, the queue and the
decision when a session counts as lost and a new one is tried.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distcurv.curvature.narrow import Sent, split
from distcurv.errors import DistcurvError
from distcurv.train.backlog import Span
from distcurv.train.conversation import Conversation, JobInfo, Parcel, SessionLost
from distcurv.train.depot import Depot, InFlight
from distcurv.wire.link import Link

log = logging.getLogger("distcurv.train")

_BACKOFF_FIRST = 0.05
_BACKOFF_LAST = 2.0


@dataclass
class Outgoing:
    """Reduced statistics of some blocks of one window, ready to be sent.

    ``payload`` is the concatenation of the blocks' statistic layouts on the training device;
    ``ready`` is the CUDA event after which it may be read (None on the CPU)."""

    span: Span
    blocks: list[int]
    basis: list[int]
    payload: Tensor = field(repr=False)
    ready: torch.cuda.Event | None = None


class Courier:
    """Carries messages between one owner and one worker (or the in-process service).

    Args:
        connect: makes a new link; called in the courier's thread, once per session.
        job: what a session says of itself.
        depot: where results go.
        route: ``worker`` or ``inline``; how installs made from it are labelled.
        emit: event sink.
    """

    def __init__(
        self,
        connect: Callable[[], Link],
        job: JobInfo,
        depot: Depot,
        route: str,
        emit: Callable[..., None],
        name: str,
    ) -> None:
        self._connect = connect
        self._job = job
        self._depot = depot
        self._emit = emit
        self.route = route
        self.name = name
        self._lock = threading.Lock()
        self._outbox: collections.deque[Parcel] = collections.deque()
        self._unseed: set[int] = set()
        self._session: bytes | None = None
        self._seq = 0
        self._link: Link | None = None
        self._stop = threading.Event()
        self._copy_stream: torch.cuda.Stream | None = None
        self.busy = 0.0
        self.sessions = 0
        self.last_error = ""
        self._thread = threading.Thread(target=self._run, name=f"distcurv-{name}", daemon=True)

    def start(self) -> None:
        """Start the thread; the link is made there."""
        self._thread.start()

    # -- called by the training thread ----------------------------------------------------

    @property
    def up(self) -> bool:
        """Whether a session is open."""
        return self._session is not None

    def offer(self, out: Outgoing) -> bool:
        """Hand statistics over.  False when no session is open; never waits for the link."""
        with self._lock:
            session = self._session
            if session is None:
                return False
            seq = self._seq
            self._seq += 1
            flight = InFlight(session, seq, *out.span)
            self._depot.depart(out.blocks, flight)
            # Taken now: once these statistics count as sent, older versions may be pruned.
            seeds = {block: self._depot.states(block) for block in out.blocks}
            self._outbox.append(Parcel(seq, out, seeds))
            link = self._link
        if link is not None:
            link.wake()
        return True

    def withdraw(self, blocks: list[int], reason: str) -> None:
        """Give up what is in flight for these blocks; they are seeded anew before the next."""
        with self._lock:
            session = self._session
            self._unseed.update(blocks)
            gone = set(blocks)
            kept = [p for p in self._outbox if gone.isdisjoint(p.out.blocks)]
            self._outbox = collections.deque(kept)
        if session is not None:
            self._depot.drop_in_flight(reason, session=session, blocks=blocks)

    def stop(self) -> None:
        """Ask the thread to say goodbye and end; `join` waits for it."""
        self._stop.set()
        link = self._link
        if link is not None:
            link.wake()

    def join(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds for the thread; says whether it has ended.

        A thread that hangs in its link is left behind: it is a daemon and holds nothing."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    # -- the thread -----------------------------------------------------------------------

    def _run(self) -> None:
        backoff = _BACKOFF_FIRST
        while not self._stop.is_set():
            before = self.sessions
            reason = self._one_session()
            if self._stop.is_set():
                break
            if self.sessions > before:
                backoff = _BACKOFF_FIRST
                self._emit("link", state="down", endpoint=self.name, reason=reason)
                log.warning("link to %s lost: %s; trying again", self.name, reason)
            self.last_error = reason
            self._stop.wait(backoff)
            backoff = min(2 * backoff, _BACKOFF_LAST)

    def _one_session(self) -> str:
        """One session from connect to loss; returns why it ended."""
        conversation: Conversation | None = None
        try:
            link = self._connect()
            try:
                conversation = Conversation(link, self._job, self._depot, self.route)
                self._converse(conversation)
                return "closed"
            finally:
                self._hang_up(conversation)
                link.close()
        except SessionLost as lost:
            return str(lost)
        except (DistcurvError, OSError) as error:
            return f"{type(error).__name__}: {error}"
        except Exception as error:
            log.exception("link to %s failed in an unforeseen way", self.name)
            return f"{type(error).__name__}: {error}"

    def _converse(self, conversation: Conversation) -> None:
        with self._lock:
            self._link = conversation.link
        while not self._stop.is_set():
            was_open = conversation.open
            conversation.pump(time.monotonic())
            if conversation.open and not was_open:
                self._opened(conversation)
            self.busy = conversation.busy
            if conversation.open:
                self._send_waiting(conversation)
        conversation.goodbye()

    def _opened(self, conversation: Conversation) -> None:
        self.sessions += 1
        with self._lock:
            self._session = conversation.session
            self._seq = 0
            self._unseed.clear()
        self._emit("link", state="up", endpoint=self.name, reason="")
        self._depot.notify()

    def _hang_up(self, conversation: Conversation | None) -> None:
        with self._lock:
            session, self._session = self._session, None
            self._outbox.clear()
            self._link = None
        if conversation is not None and session is not None:
            self._depot.lose_session(session, f"session with {self.name} ended")
        self._depot.notify()

    def _send_waiting(self, conversation: Conversation) -> None:
        while True:
            with self._lock:
                parcel = self._outbox[0] if self._outbox else None
                conversation.forget_seeds(self._unseed)
                self._unseed.clear()
            if parcel is None:
                return
            self._fetch(parcel)
            if not conversation.send_statistics(parcel):
                return
            with self._lock:
                if self._outbox and self._outbox[0] is parcel:
                    self._outbox.popleft()
            out = parcel.out
            nbytes = parcel.sent.nbytes
            self._emit(
                "statistic_sent",
                seq=parcel.seq,
                since=out.span.since,
                through=out.span.through,
                blocks=out.blocks,
                basis=out.basis,
                bytes=nbytes,
                route=self.route,
            )
            self._depot.count(sent=1, bytes_out=nbytes if self.route == "worker" else 0)

    def _fetch(self, parcel: Parcel) -> None:
        """Bring a payload to the CPU as it travels, in this thread and on a stream of its own."""
        if parcel.fetched:
            return
        layouts = [self._job.table.statistic_layouts[block] for block in parcel.out.blocks]
        payload = parcel.out.payload
        if payload.is_cuda:
            if self._copy_stream is None:
                self._copy_stream = torch.cuda.Stream(payload.device)
            with torch.cuda.stream(self._copy_stream):
                if parcel.out.ready is not None:
                    self._copy_stream.wait_event(parcel.out.ready)
                wide, narrow = split(layouts, payload)
                parcel.sent = Sent(wide.to("cpu"), narrow.to("cpu"))
        else:
            parcel.sent = split(layouts, payload)
        parcel.fetched = True
