"""Messages inside one process, so that in-process use runs the very service that workers run.

Messages pass through the codec like everywhere, so both links show the same refusals; a
payload is handed over without a copy.  A server is known by its name in this process.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

from distcurv.errors import EndpointError, LinkError, ProtocolError
from distcurv.wire.checks import Limits
from distcurv.wire.codec import Buffer, decode, encode
from distcurv.wire.endpoints import parse_connectable, parse_endpoint
from distcurv.wire.link import Incoming, ThreadOwned
from distcurv.wire.messages import Message

QUEUED = 16  # messages of one sender that wait before a send is refused

Frames = Sequence[Buffer]
Item = TypeVar("Item")

_SERVERS: dict[str, MemoryServer] = {}
_SERVERS_LOCK = threading.Lock()
_NUMBERS = itertools.count(1)


class Mailbox(Generic[Item]):
    """A queue with a bounded share for each sender; any thread may use it."""

    def __init__(self) -> None:
        self._items: deque[tuple[bytes, Item]] = deque()
        self._waiting: dict[bytes, int] = {}
        self._changed = threading.Condition()
        self._woken = False
        self._closed = False

    def put(self, sender: bytes, item: Item) -> bool:
        """False when the sender's share is full, or the mailbox closed."""
        with self._changed:
            waiting = self._waiting.get(sender, 0)
            if self._closed or waiting >= QUEUED:
                return False
            self._waiting[sender] = waiting + 1
            self._items.append((sender, item))
            self._changed.notify_all()
            return True

    def get(self, deadline: float) -> tuple[bytes, Item] | None:
        """The oldest item and its sender; None when woken or after the deadline."""
        with self._changed:
            while not self._items:
                remaining = deadline - time.monotonic()
                if self._woken or remaining <= 0:
                    self._woken = False
                    return None
                self._changed.wait(min(remaining, threading.TIMEOUT_MAX))
            sender, item = self._items.popleft()
            self._waiting[sender] -= 1
            if not self._waiting[sender]:
                del self._waiting[sender]
            return sender, item

    def wake(self) -> None:
        """Make a waiting or the next `get` return."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def close(self) -> None:
        """Take nothing any more and let go of what is in it."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._waiting.clear()


class MemoryLink(ThreadOwned):
    """The owner's end.  It finds the server by name at each send, like a connection."""

    def __init__(self, endpoint: str, limits: Limits | None = None) -> None:
        super().__init__()
        place = parse_connectable(endpoint)
        self.endpoint = str(place)
        self._name = place.address
        self._limits = limits or Limits()
        self._inbox: Mailbox[Frames] = Mailbox()
        self._server: MemoryServer | None = None
        self._peer = b""
        self._closed = False

    def send(self, message: Message) -> bool:
        """As `Link.send`.  False also while there is no server of that name."""
        self._enter_open()
        frames = encode(message, self._limits)
        server = _SERVERS.get(self._name)
        if server is None:
            return False
        if server is not self._server:
            self._server, self._peer = server, server.admit(self._inbox)
        return server.inbox.put(self._peer, frames)

    def receive(self, timeout: float) -> Message | None:
        """As `Link.receive`."""
        self._enter_open()
        got = self._inbox.get(time.monotonic() + timeout)
        return None if got is None else decode(got[1], self._limits)

    def wake(self) -> None:
        """As `Link.wake`."""
        self._inbox.wake()

    def close(self) -> None:
        """As `Link.close`."""
        if self._closed:
            return
        self.enter()
        self._closed = True
        self._inbox.close()
        if self._server is not None:
            self._server.part(self._peer)

    def _enter_open(self) -> None:
        self.enter()
        if self._closed:
            raise LinkError(f"the link to {self.endpoint} is closed: open a new one")


class MemoryServer(ThreadOwned):
    """The worker's end, known as ``memory://NAME`` in this process; no NAME chooses one."""

    def __init__(self, endpoint: str = "memory://", limits: Limits | None = None) -> None:
        super().__init__()
        self._name = parse_endpoint(endpoint).address or f"_{next(_NUMBERS)}"
        self.endpoint = f"memory://{self._name}"
        self.inbox: Mailbox[Frames] = Mailbox()  # links put into it
        self._limits = limits or Limits()
        self._peers: dict[bytes, Mailbox[Frames]] = {}
        self._dropped: set[bytes] = set()
        self._closed = False
        with _SERVERS_LOCK:
            if _SERVERS.setdefault(self._name, self) is not self:
                raise EndpointError(f"endpoint '{self.endpoint}' is taken by another server")

    def part(self, peer: bytes) -> None:
        """Forget a link that closed; what it sent before is still received."""
        self._peers.pop(peer, None)

    def admit(self, inbox: Mailbox[Frames]) -> bytes:
        """Give a link that comes for the first time its peer name.  From the link's thread."""
        peer = next(_NUMBERS).to_bytes(8, "big")
        self._peers[peer] = inbox
        return peer

    def receive(self, timeout: float) -> Incoming | None:
        """As `Server.receive`."""
        self._enter_open()
        deadline = time.monotonic() + timeout
        while (got := self.inbox.get(deadline)) is not None:
            peer, frames = got
            if peer in self._dropped:
                if time.monotonic() < deadline:
                    continue
                break  # a dropped peer that floods must not hold the caller
            content: Message | ProtocolError
            try:
                content = decode(frames, self._limits)
            except ProtocolError as error:
                content = error
            return Incoming(peer, content, sum(len(frame) for frame in frames))
        return None

    def send(self, peer: bytes, message: Message) -> bool:
        """As `Server.send`."""
        self._enter_open()
        frames = encode(message, self._limits)
        inbox = self._peers.get(peer)
        return inbox is not None and inbox.put(b"", frames)

    def drop(self, peer: bytes) -> None:
        """As `Server.drop`."""
        self._enter_open()
        self._dropped.add(peer)
        self._peers.pop(peer, None)

    def wake(self) -> None:
        """As `Server.wake`."""
        self.inbox.wake()

    def close(self) -> None:
        """As `Server.close`."""
        if self._closed:
            return
        self.enter()
        self._closed = True
        with _SERVERS_LOCK:
            del _SERVERS[self._name]
        self.inbox.close()
        self._peers.clear()

    def _enter_open(self) -> None:
        self.enter()
        if self._closed:
            raise LinkError(f"the server of {self.endpoint} is closed: bind a new one")
