"""Ties the service to a server and to the compute thread: one poll loop, in any thread.

A worker process runs it in its main thread, an inline worker in a daemon thread of the training
process; so there is no signal handling here and nothing process-wide is set.
"""

from __future__ import annotations

import logging
import time
from typing import Protocol

from distcurv.errors import ProtocolError
from distcurv.wire.link import Server
from distcurv.worker.compute import Computer, ComputeThread
from distcurv.worker.outbox import Outbox
from distcurv.worker.replies import Emit, Outgoing
from distcurv.worker.service import Service

log = logging.getLogger("distcurv.worker")

BURST = 64  # messages taken in before ticks and results get their turn
LONGEST_PAUSE = 0.2  # seconds; how late a stop can be noticed that nobody woke the server for
FAREWELL = 1.0  # seconds that owners may take to acknowledge and to read the last messages
LAST_WORDS = 0.2  # seconds between a Goodbye and the close, which may overtake it on a socket


class Stop(Protocol):
    """What says that the loop should end; a `threading.Event` is one."""

    def is_set(self) -> bool:
        """Whether to end."""
        ...


def run(server: Server, service: Service, *, stop: Stop, emit: Emit, name: str = "worker") -> None:
    """Serve until ``stop`` is set, then drain: finish the job under way, send what it published,
    say goodbye, close the server.

    Wake the server after setting ``stop`` to end without delay.  Raises `ConfigError` when the
    settings' device is not there, and whatever a refresh raised that is no failure of its own
    data; the owners get a Goodbye first."""
    try:
        compute = ComputeThread(Computer(service.settings.device), server.wake, name)
        compute.start()
        try:
            _Loop(server, service, compute).serve(stop, emit)
        finally:
            compute.close()
    finally:
        server.close()


class _Loop:
    def __init__(self, server: Server, service: Service, compute: ComputeThread) -> None:
        self.server = server
        self.service = service
        self.compute = compute
        self.outbox = Outbox(server, service.settings.session_timeout)
        self.pause = min(LONGEST_PAUSE, service.settings.heartbeat / 4)

    def serve(self, stop: Stop, emit: Emit) -> None:
        emit("link", state="up", endpoint=self.server.endpoint, reason="listening")
        reason = "the worker failed"
        try:
            while not stop.is_set() or self.compute.busy:
                self._take_messages()
                self._take_result()
                if not stop.is_set():
                    job = self.service.next_job(time.monotonic())
                    if job is not None:
                        self.compute.submit(job)
                self._tick()
            self._await_acknowledgements()
            reason = "the worker was stopped"
        finally:
            self._farewell(reason)
            emit("link", state="down", endpoint=self.server.endpoint, reason=reason)

    def _take_messages(self) -> None:
        for count in range(BURST):
            incoming = self.server.receive(0.0 if count else self.pause)
            if incoming is None:
                return
            peer, content, nbytes = incoming
            self._post(self.service.on_message(peer, content, time.monotonic(), nbytes))
            if isinstance(content, ProtocolError):
                log.warning("dropped a peer that sent an invalid message: %s", content)
                self.server.drop(peer)

    def _take_result(self) -> None:
        done = self.compute.collect()
        if done is not None:
            job, outcome = done
            self._post(self.service.on_result(job, outcome, time.monotonic()))

    def _tick(self) -> None:
        now = time.monotonic()
        self._post(self.service.on_tick(now))
        for peer in self.outbox.flush(now):
            self.service.on_lost(peer)
            self.server.drop(peer)

    def _await_acknowledgements(self) -> None:
        """Give what was published last a chance to arrive before the Goodbye."""
        deadline = time.monotonic() + FAREWELL
        while self.service.unacknowledged() and time.monotonic() < deadline:
            self._take_messages()
            self._tick()

    def _farewell(self, reason: str) -> None:
        goodbyes = self.service.on_stop(reason)
        self._post(goodbyes)
        now = time.monotonic()
        least = now + LAST_WORDS if goodbyes else now
        most = now + FAREWELL
        while now < least or (now < most and not self.outbox.empty()):
            self.server.receive(0.02)  # lets the link work; what comes now is too late
            now = time.monotonic()
            self.outbox.flush(now)

    def _post(self, messages: Outgoing) -> None:
        now = time.monotonic()
        for peer, message in messages:
            self.outbox.post(peer, message, now)
