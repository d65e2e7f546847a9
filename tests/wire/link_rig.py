"""What the link tests need: places to bind, waits with a deadline, and bytes put in by hand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import zmq

from distcurv.wire import Limits, Link, Server, bind, connect
from distcurv.wire.link import Incoming
from distcurv.wire.memory import Mailbox, MemoryLink, MemoryServer
from distcurv.wire.messages import Message
from distcurv.wire.zmq_link import ZmqLink, ZmqServer, _context

DEADLINE = 120.0  # seconds after which something that must happen has failed to

Result = TypeVar("Result")


class Rig:
    """Makes links and servers and closes them all at the end of a test."""

    def __init__(self, scheme: str, folder: Path) -> None:
        self.scheme = scheme
        self.stack = ExitStack()
        places = {"memory": "memory://", "tcp": "tcp://127.0.0.1:0", "ipc": f"ipc://{folder}/s"}
        self.place = places[scheme]  # a new link needs a place here to be tested

    def server(self, endpoint: str = "", limits: Limits | None = None) -> Server:
        server = bind(endpoint or self.place, limits)
        self.stack.callback(server.close)
        return server

    def link(self, server: Server | str) -> Link:
        link = connect(server if isinstance(server, str) else server.endpoint)
        self.stack.callback(link.close)
        return link

    def inject(self, server: Server, frames: list[bytes]) -> None:
        """Deliver frames to a server as if a peer had sent them."""
        if isinstance(server, MemoryServer):
            assert server.inbox.put(server.admit(Mailbox()), frames)
            return
        socket = _context().socket(zmq.DEALER)
        self.stack.callback(socket.close, 0)
        socket.connect(server.endpoint)
        socket.send_multipart(frames)

    def inject_reply(self, server: Server, peer: bytes, link: Link, frames: list[bytes]) -> None:
        """Deliver frames to a link as if its server had sent them."""
        if isinstance(server, ZmqServer):
            assert isinstance(link, ZmqLink)
            server._socket.send_multipart([peer, *frames])
        else:
            assert isinstance(link, MemoryLink)
            assert link._inbox.put(b"", frames)


def put(link: Link, message: Message) -> None:
    """Send once the link can take it.  Only while nothing comes back on it."""
    deadline = time.monotonic() + DEADLINE
    while not link.send(message):
        assert time.monotonic() < deadline, "could not be sent"
        assert link.receive(0.01) is None


def fill(send: Callable[[int], bool]) -> int:
    """Send numbered 1 MiB messages until no more can be queued anywhere; returns how many."""
    sent = refusals = 0
    while refusals < 10:
        if send(sent):
            sent, refusals = sent + 1, 0
            assert sent < 200, "1 MiB messages are queued without end"
        else:
            refusals += 1
            time.sleep(0.01)  # what is in flight moves from this queue to the other end's
    return sent


def take(server: Server) -> Incoming:
    """The next thing that a server receives."""
    return until(lambda: server.receive(DEADLINE))


def take_reply(link: Link) -> Message:
    """The next message that a link receives."""
    return until(lambda: link.receive(DEADLINE))


def until(attempt: Callable[[], Result | None]) -> Result:
    """What ``attempt`` returns, once that is something."""
    deadline = time.monotonic() + DEADLINE
    while (result := attempt()) is None or result is False:
        assert time.monotonic() < deadline, "nothing came before the deadline"
    return result


@contextmanager
def in_thread(work: Callable[[], object]) -> Iterator[Callable[[], object]]:
    """Run ``work`` in another thread; the yielded call waits for it and returns its result."""
    results: list[object] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001  (raised again in the test's thread)
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result() -> object:
        thread.join(DEADLINE)
        assert not thread.is_alive(), "the thread did not end"
        if errors:
            raise errors[0]
        return results[0]

    try:
        yield result
    finally:
        thread.join(DEADLINE)
