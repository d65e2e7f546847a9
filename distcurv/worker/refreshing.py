"""From waiting statistics to jobs, and from their outcomes to new versions.  No I/O.

At most one job is out at a time.  An outcome finds its session by ordinal, so that what a
session ordered before it ended is never given to the one that replaced it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from distcurv.errors import ProtocolError
from distcurv.wire.messages import Ack, Error
from distcurv.worker.jobs import Folded, Job, Outcome
from distcurv.worker.replies import Emit, Outgoing, error_message, published_message
from distcurv.worker.schedule import Snapshot, plan
from distcurv.worker.sessions import Session, Sessions
from distcurv.worker.settings import WorkerSettings
from distcurv.worker.store import Release

log = logging.getLogger("distcurv.worker")


@dataclass
class _Out:
    """The job that is being computed."""

    job: Job
    session: int  # ordinal
    since: float  # seconds; moves on when its time so far has been counted


class Refreshing:
    """Hands out refresh calls for all sessions and takes their results in."""

    def __init__(self, sessions: Sessions, settings: WorkerSettings, emit: Emit) -> None:
        self.sessions = sessions
        self.settings = settings
        self._emit = emit
        self._out: _Out | None = None
        self._tickets = 0
        self._computed = 0.0  # seconds since the last take_computed

    def take_computed(self, now: float) -> float:
        """Seconds spent computing since the last call of this method."""
        if self._out is not None:
            self._computed += now - self._out.since
            self._out.since = now
        seconds, self._computed = self._computed, 0.0
        return seconds

    def next_job(self, now: float) -> Job | None:
        """The most urgent refresh call; None while one is out or when nothing waits."""
        if self._out is not None:
            return None
        waiting = [
            entry for session in self.sessions for entry in session.store.waiting(session.ordinal)
        ]
        picks, reason = plan(now, Snapshot(tuple(waiting)), self.settings)
        if not picks:
            return None
        pick = picks[0]
        session = self.sessions.numbered(pick.session)
        if session is None:
            raise AssertionError(f"session {pick.session} has statistics but has ended")
        log.debug("refresh of %d blocks: %s", len(pick.blocks), reason)
        job = Job(
            ticket=self._tickets,
            seq=pick.seq,
            spec=session.store.blocks[pick.blocks[0]].spec,
            items=tuple(session.store.take(block) for block in pick.blocks),
        )
        self._tickets += 1
        self._out = _Out(job, session.ordinal, now)
        return job

    def on_result(self, job: Job, outcome: Outcome, now: float) -> Outgoing:
        """New versions and refusals for the owner; nothing where its session has ended."""
        out = self._out
        if out is None or out.job.ticket != job.ticket:
            raise AssertionError(f"job {job.ticket} has a result but is not the one that is out")
        self._computed += now - out.since
        self._out = None
        session = self.sessions.numbered(out.session)
        if session is None:
            log.info("result of job %d discarded: its session has ended", job.ticket)
            return []
        share = (outcome.t1 - outcome.t0) / 1e9 / len(job.items)
        done: list[tuple[int, Release]] = []
        failed: list[tuple[int, str]] = []
        for item, result in zip(job.items, outcome.results, strict=True):
            if not session.store.computing(item.block):
                log.info("result for %s discarded: it was seeded anew meanwhile", item.name)
            elif isinstance(result, Folded):
                done.append((item.block, session.store.fold(item.block, result, share, now)))
            else:
                session.store.fail(item.block)
                failed.append((item.block, result.text))
        replies: Outgoing = []
        if done:
            replies += self._announce(session, job, outcome, done)
        if failed:
            replies.append((session.peer, self._failure(session, job, failed)))
        return replies

    def _announce(
        self, session: Session, job: Job, outcome: Outcome, done: list[tuple[int, Release]]
    ) -> Outgoing:
        blocks = [block for block, _ in done]
        names = session.store.names(blocks)
        message = published_message(session.id, done)
        self._emit(
            "refresh",
            blocks=names,
            seq=job.seq,
            versions=message.versions,
            t0=outcome.t0,
            t1=outcome.t1,
            uncaptured=message.uncaptured,
            innovation=message.innovation,
            owner=session.hello.owner,
        )
        self._emit(
            "publish",
            blocks=names,
            versions=message.versions,
            based_on=message.based_on,
            bytes=message.payload.nbytes + message.narrow.nbytes,
            owner=session.hello.owner,
        )
        ack = Ack(session.id, "statistics", blocks, [job.seq] * len(blocks))
        return [(session.peer, ack), (session.peer, message)]

    def _failure(self, session: Session, job: Job, failed: list[tuple[int, str]]) -> Error:
        blocks = [block for block, _ in failed]
        names = ", ".join(session.store.names(blocks)[:5])
        text = f"{len(blocks)} blocks keep their version ({names}): {failed[0][1]}"
        log.warning("refresh failed: %s", text)
        self._emit("warning", text=f"refresh failed: {text}")
        return error_message(session.id, ProtocolError("refresh_failed", text), blocks, job.seq)
