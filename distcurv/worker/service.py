"""The worker without its sockets: messages and ticks in, messages and jobs out (as h11 does it).

No I/O and no clock: time comes in as ``now`` (seconds of any monotonic clock), refresh results
come back through `on_result`.  So every rule of the protocol can be tested with a script.
What `emit` receives are facts for the event log; nothing depends on them.
"""

from __future__ import annotations

import logging

from distcurv.errors import ProtocolError
from distcurv.wire.messages import (
    Ack,
    Error,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    Seed,
    Statistics,
    Welcome,
)
from distcurv.worker import intake
from distcurv.worker.jobs import Job, Outcome
from distcurv.worker.refreshing import Refreshing
from distcurv.worker.replies import Emit, Outgoing, error_message, published_messages
from distcurv.worker.sessions import Session, Sessions
from distcurv.worker.settings import WorkerSettings

log = logging.getLogger("distcurv.worker")


class Service:
    """All sessions of one worker.  One thread uses it; at most one job is out at a time."""

    def __init__(self, settings: WorkerSettings, emit: Emit, pid: int) -> None:
        self.settings = settings
        self.sessions = Sessions(settings)
        self._emit = emit
        self._pid = pid
        self.refreshing = Refreshing(self.sessions, settings, emit)
        self._beat_at: float | None = None  # when the last heartbeat was due

    # -- messages -------------------------------------------------------------------------

    def on_message(
        self, peer: bytes, content: Message | ProtocolError, now: float, nbytes: int = 0
    ) -> Outgoing:
        """Answers to one message, or to bytes that were none (those end the peer's session)."""
        session = self.sessions.of(peer)
        if isinstance(content, ProtocolError):
            if session is not None:
                self._end(session, f"sent an invalid message ({content.code})")
            return [(peer, error_message(session.id if session else b"", content))]
        if isinstance(content, Hello):
            return self._hello(peer, content, now)
        if session is None or session.id != content.session:
            if isinstance(content, (Error, Goodbye)):  # an answer to those could go on for ever
                return []
            refusal = ProtocolError("no_session", "open a session with Hello first")
            return [(peer, error_message(content.session, refusal))]
        session.heard = now
        try:
            return self._of_session(session, content, now, nbytes)
        except ProtocolError as refusal:
            log.warning("owner %d: %s", session.hello.owner, refusal)
            return [(peer, error_message(session.id, refusal))]

    def _hello(self, peer: bytes, hello: Hello, now: float) -> Outgoing:
        try:
            admission = self.sessions.admit(peer, hello, now)
        except ProtocolError as refusal:
            log.warning("refused owner %d of job %s: %s", hello.owner, hello.job.hex(), refusal)
            return [(peer, error_message(hello.session, refusal))]
        out: Outgoing = []
        for old in admission.replaced:
            self._closed(old, "replaced")
            if old.peer != peer:
                out.append((old.peer, Goodbye(old.id, "replaced by a newer session")))
        session = admission.session
        session.heard = now
        if admission.opened:
            log.info(
                "session open: owner %d of job %s, %d blocks",
                hello.owner,
                hello.job.hex(),
                len(hello.blocks),
            )
            self._session_event(session, "open", "hello")
        return [*out, (peer, Welcome(session.id, self._pid, self.settings.device))]

    def _of_session(self, session: Session, message: Message, now: float, nbytes: int) -> Outgoing:
        if isinstance(message, Statistics):
            return self._statistics(session, message, now, nbytes)
        if isinstance(message, Seed):
            intake.take_seed(session, message)
            return []
        if isinstance(message, Ack):
            intake.take_ack(session, message)
            return []
        if isinstance(message, Heartbeat):
            return []
        if isinstance(message, Goodbye):
            self._end(session, f"goodbye: {message.reason}")
            return []
        if isinstance(message, Error):
            text = f"owner {session.hello.owner} refused: {message.code}: {message.text}"
            log.warning("%s", text)
            self._emit("warning", text=text)
            return []
        raise ProtocolError("unexpected", f"{type(message).__name__} is not for a worker")

    def _statistics(
        self, session: Session, message: Statistics, now: float, nbytes: int
    ) -> Outgoing:
        try:
            parts = intake.check_statistics(session, message)
        except ProtocolError as refusal:
            error = error_message(session.id, refusal, message.blocks, message.seq)
            log.warning("owner %d: %s", session.hello.owner, refusal)
            return [(session.peer, error)]
        self._emit(
            "statistic_received",
            seq=message.seq,
            since=message.since,
            through=message.through,
            blocks=session.store.names(message.blocks),
            basis=message.basis,
            bytes=nbytes,
            owner=session.hello.owner,
        )
        errors = intake.queue_statistics(session, message, parts, now)
        for error in errors:
            log.warning("owner %d: %s: %s", session.hello.owner, error.code, error.text)
        return [(session.peer, error) for error in errors]

    # -- time -----------------------------------------------------------------------------

    def on_tick(self, now: float) -> Outgoing:
        """End silent sessions; every heartbeat period, say so and resend what has no ack."""
        out: Outgoing = []
        for session in self.sessions.silent(now):
            reason = f"nothing heard for {self.settings.session_timeout} s"
            self._end(session, reason)
            out.append((session.peer, Goodbye(session.id, reason)))
        if self._beat_at is None:
            self._beat_at = now
        period = now - self._beat_at
        if period < self.settings.heartbeat:
            return out
        self._beat_at = now
        busy = min(1.0, self.refreshing.take_computed(now) / period)
        queued = 0
        for session in self.sessions:
            waiting = session.store.unfolded()
            queued += waiting
            out.append((session.peer, Heartbeat(session.id, busy, waiting)))
            late = session.store.overdue(now)
            for message in published_messages(session.id, late, self.settings.max_batch_bytes):
                out.append((session.peer, message))
        if list(self.sessions):
            self._emit("heartbeat", busy=busy, queued=queued)
        return out

    def on_lost(self, peer: bytes) -> None:
        """The link to a peer is stuck or gone: end its session without a word."""
        session = self.sessions.of(peer)
        if session is not None:
            self._end(session, "the owner does not read")

    def unacknowledged(self) -> int:
        """How many published versions no owner has acknowledged."""
        return sum(len(session.store.unacknowledged) for session in self.sessions)

    def on_stop(self, reason: str) -> Outgoing:
        """The worker ends: say goodbye to every owner and forget everything."""
        out: Outgoing = []
        for session in self.sessions:
            self._end(session, reason)
            out.append((session.peer, Goodbye(session.id, reason)))
        return out

    # -- jobs -----------------------------------------------------------------------------

    def next_job(self, now: float) -> Job | None:
        """The most urgent refresh call; None while one is out or when nothing waits."""
        return self.refreshing.next_job(now)

    def on_result(self, job: Job, outcome: Outcome, now: float) -> Outgoing:
        """Take a job's outcome in.  Nothing comes of it where the session has ended meanwhile."""
        return self.refreshing.on_result(job, outcome, now)

    # -- endings --------------------------------------------------------------------------

    def _end(self, session: Session, reason: str) -> None:
        self.sessions.end(session)
        self._closed(session, reason)

    def _closed(self, session: Session, reason: str) -> None:
        log.info("session closed: owner %d, %s", session.hello.owner, reason)
        self._session_event(session, "closed", reason)

    def _session_event(self, session: Session, state: str, reason: str) -> None:
        self._emit(
            "session",
            state=state,
            reason=reason,
            owner=session.hello.owner,
            job=session.hello.job.hex(),
            session=session.id.hex(),
            generation=session.hello.generation,
            blocks=len(session.store.blocks),
        )
