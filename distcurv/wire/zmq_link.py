"""Messages over ZeroMQ, between processes and between machines: ``tcp://`` and ``ipc://``.

The owner opens a DEALER for each session, the worker binds one ROUTER.  Both queue little
(`QUEUED` messages a side), so a peer that does not read is felt at once as a False from
``send``.  A connection that breaks loses what was queued for it; the messages' own
acknowledgements repair that.  Nothing here blocks: contexts are never terminated (that waits
for peers), so neither ``close`` nor the end of the process can hang on a peer that is gone.
"""

from __future__ import annotations

import errno
import math
import os
import socket as sockets
import stat
import threading
import time
from collections.abc import Sequence

import zmq

from distcurv.errors import EndpointError, LinkError, ProtocolError
from distcurv.wire.checks import Limits
from distcurv.wire.codec import Buffer, decode, encode
from distcurv.wire.endpoints import Endpoint, parse_connectable, parse_endpoint, refuse_public_bind
from distcurv.wire.link import Incoming, ThreadOwned
from distcurv.wire.messages import Message
from distcurv.wire.waker import Waker

QUEUED = 16  # messages that wait on each side of a connection before a send is refused
LINGER_MS = 200  # what a close gives the last words (Goodbye), in the background
REMEMBERED = 4096  # dropped peers whose connection may still be open

# These find connections whose machine is gone; that a peer has gone silent is for the
# messages' own Heartbeat to find.  A ping waits behind the frame that is being sent, so the
# timeout must exceed the time that the largest frame takes on the slowest network.
HEARTBEAT_MS = 5_000
HEARTBEAT_TIMEOUT_MS = 60_000

_CONTEXTS: dict[int, zmq.Context[zmq.Socket[bytes]]] = {}  # by pid: a fork must not share one
_CONTEXTS_LOCK = threading.Lock()


class ZmqLink(ThreadOwned):
    """The owner's end: one DEALER, opened by the thread that first sends or receives."""

    def __init__(self, endpoint: str, limits: Limits | None = None) -> None:
        super().__init__()
        self._place = parse_connectable(endpoint)
        self.endpoint = str(self._place)
        self._limits = limits or Limits()
        self._waker = Waker()
        self._socket: zmq.Socket[bytes] | None = None
        self._closed = False

    def send(self, message: Message) -> bool:
        """As `Link.send`.  False also while there is no connection."""
        return _send(self._opened(), encode(message, self._limits))

    def receive(self, timeout: float) -> Message | None:
        """As `Link.receive`."""
        frames = _receive(self._opened(), self._waker, time.monotonic() + timeout)
        return None if frames is None else decode([f.buffer for f in frames], self._limits)

    def wake(self) -> None:
        """As `Link.wake`."""
        self._waker.set()

    def close(self) -> None:
        """As `Link.close`.  Returns at once; what is queued gets `LINGER_MS` to leave."""
        if self._closed:
            return
        self.enter()
        self._closed = True
        self._waker.close()
        if self._socket is not None:
            self._socket.close(linger=LINGER_MS)

    def _opened(self) -> zmq.Socket[bytes]:
        self.enter()
        if self._closed:
            raise LinkError(f"the link to {self.endpoint} is closed: open a new one")
        if self._socket is None:
            self._socket = _socket(zmq.DEALER, self._place, self._limits)
            self._socket.set(zmq.IMMEDIATE, 1)
            self._socket.set(zmq.RECONNECT_IVL_MAX, 1_000)
            self._socket.connect(self.endpoint)
        return self._socket


class ZmqServer(ThreadOwned):
    """The worker's end: one ROUTER, bound when made, used by the thread that first receives.

    Port 0 chooses a port; ``endpoint`` is what was bound.  A place that is taken is tried
    again for ``patience`` seconds, since a predecessor may just be ending.

    Raises:
        EndpointError: other machines could connect, or the place cannot be bound.
    """

    def __init__(
        self, endpoint: str, limits: Limits | None = None, *, patience: float = 5.0
    ) -> None:
        super().__init__()
        place = parse_endpoint(endpoint)
        refuse_public_bind(place)
        if place.address == "localhost":
            place = Endpoint("tcp", "127.0.0.1", place.port)  # zmq binds addresses, not names
        self._limits = limits or Limits()
        self._dropped: dict[bytes, None] = {}
        self._closed = False
        self._socket = _socket(zmq.ROUTER, place, self._limits)
        self._socket.set(zmq.ROUTER_MANDATORY, 1)
        try:
            _bind(self._socket, place, time.monotonic() + patience)
        except EndpointError:
            self._socket.close()
            raise
        self.endpoint = self._socket.get_string(zmq.LAST_ENDPOINT)
        self._waker = Waker()

    def receive(self, timeout: float) -> Incoming | None:
        """As `Server.receive`."""
        self._enter_open()
        deadline = time.monotonic() + timeout
        while (parts := _receive(self._socket, self._waker, deadline)) is not None:
            peer, frames = parts[0].bytes, parts[1:]
            if peer in self._dropped:
                if time.monotonic() < deadline:
                    continue
                break  # a dropped peer that floods must not hold the caller
            content: Message | ProtocolError
            try:
                content = decode([frame.buffer for frame in frames], self._limits)
            except ProtocolError as error:
                content = error
            return Incoming(peer, content, sum(len(frame) for frame in frames))
        return None

    def send(self, peer: bytes, message: Message) -> bool:
        """As `Server.send`."""
        self._enter_open()
        frames = encode(message, self._limits)
        return peer not in self._dropped and _send(self._socket, [peer, *frames])

    def drop(self, peer: bytes) -> None:
        """As `Server.drop`.  (zmq cannot close one connection of a ROUTER; it is ignored.)"""
        self._enter_open()
        self._dropped[peer] = None
        if len(self._dropped) > REMEMBERED:
            del self._dropped[next(iter(self._dropped))]

    def wake(self) -> None:
        """As `Server.wake`."""
        self._waker.set()

    def close(self) -> None:
        """As `Server.close`.  Returns at once; what is queued gets `LINGER_MS` to leave."""
        if self._closed:
            return
        self.enter()
        self._closed = True
        self._waker.close()
        self._socket.close(linger=LINGER_MS)

    def _enter_open(self) -> None:
        self.enter()
        if self._closed:
            raise LinkError(f"the server of {self.endpoint} is closed: bind a new one")


def _context() -> zmq.Context[zmq.Socket[bytes]]:
    with _CONTEXTS_LOCK:
        if os.getpid() not in _CONTEXTS:
            _CONTEXTS[os.getpid()] = zmq.Context()
        return _CONTEXTS[os.getpid()]


def _socket(kind: int, place: Endpoint, limits: Limits) -> zmq.Socket[bytes]:
    socket = _context().socket(kind)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.SNDHWM, QUEUED)
    socket.set(zmq.RCVHWM, QUEUED)
    socket.set(zmq.MAXMSGSIZE, limits.frame_bytes)
    socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.set(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS)
    socket.set(zmq.IPV6, 1 if ":" in place.address else 0)
    return socket


def _send(socket: zmq.Socket[bytes], parts: Sequence[Buffer]) -> bool:
    try:
        # Without a copy: zmq keeps each large part's buffer alive until it is sent.
        socket.send_multipart(parts, zmq.NOBLOCK, copy=False)
    except zmq.ZMQError as error:
        if error.errno in (zmq.EAGAIN, zmq.EHOSTUNREACH):
            return False  # the queue is full or there is no connection; the peer is gone
        raise
    return True


def _receive(socket: zmq.Socket[bytes], waker: Waker, deadline: float) -> list[zmq.Frame] | None:
    """The frames of the next message; None when woken or after the deadline."""
    woken = False
    while True:
        try:
            return socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:  # nothing there yet
            remaining = deadline - time.monotonic()
        if woken or remaining <= 0:
            return None
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(waker.fileno(), zmq.POLLIN)
        ready = dict(poller.poll(math.ceil(min(remaining, 3600.0) * 1000)))
        if waker.fileno() in ready:
            waker.clear()
            woken = True


def _bind(socket: zmq.Socket[bytes], place: Endpoint, deadline: float) -> None:
    while True:
        try:
            if place.scheme == "ipc":
                _require_free(place)
            socket.bind(str(place))
            break
        except (OSError, zmq.ZMQError) as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() >= deadline:
                raise EndpointError(f"endpoint '{place}' cannot be bound: {error}") from error
        time.sleep(0.02)
    if place.scheme == "ipc":
        os.chmod(place.address, 0o600)


def _require_free(place: Endpoint) -> None:
    """Raise OSError unless the path is free: zmq would remove whatever stands there."""
    path = place.address
    if os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise FileExistsError(errno.EEXIST, "there is a file and it is no socket", path)
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
        probe.setblocking(False)
        found = probe.connect_ex(path)
    if found not in (errno.ENOENT, errno.ECONNREFUSED):  # neither absent nor left behind
        raise OSError(errno.EADDRINUSE, "a server listens there", path)
