"""Keeps what a peer could not take yet, in order and within bounds, so that sending never blocks.

Heartbeats and published versions are not kept: the service sends them again by itself.  Acks,
errors and goodbyes are, because an owner keeps a statistic in flight until it hears of it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from distcurv.wire.link import Server
from distcurv.wire.messages import Heartbeat, Message, Published

MOST = 256  # messages kept for one peer


@dataclass
class _Backlog:
    since: float  # seconds; when the peer last took something, or when the first was kept
    messages: deque[Message] = field(default_factory=deque)


class Outbox:
    """Sends to all peers of a server; peers that do not read for ``patience`` s are given up."""

    def __init__(self, server: Server, patience: float) -> None:
        self._server = server
        self._patience = patience
        self._backlogs: dict[bytes, _Backlog] = {}

    def post(self, peer: bytes, message: Message, now: float) -> None:
        """Send, or keep what must not be lost."""
        backlog = self._backlogs.get(peer)
        if backlog is None and self._server.send(peer, message):
            return
        if isinstance(message, (Heartbeat, Published)):
            return
        if backlog is None:
            backlog = self._backlogs[peer] = _Backlog(now)
        backlog.messages.append(message)

    def flush(self, now: float) -> list[bytes]:
        """Try again; returns the peers that were given up, whose messages are forgotten."""
        lost = []
        for peer, backlog in list(self._backlogs.items()):
            while backlog.messages and self._server.send(peer, backlog.messages[0]):
                backlog.messages.popleft()
                backlog.since = now
            if not backlog.messages:
                del self._backlogs[peer]
            elif len(backlog.messages) > MOST or now - backlog.since > self._patience:
                del self._backlogs[peer]
                lost.append(peer)
        return lost

    def empty(self) -> bool:
        """Whether nothing waits."""
        return not self._backlogs
