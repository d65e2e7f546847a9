"""What every link promises, so that ranks and workers need not know what carries a message.

A `Link` is the owner's end of one session, a `Server` the worker's end of all its sessions.
Both belong to the thread that first uses them: `ThreadOwned` asserts it, which is how the
training thread is kept out of every link.  Only `wake` may be called from another thread.
"""

from __future__ import annotations

import os
import threading
from typing import NamedTuple, Protocol

from distcurv.errors import LinkError, ProtocolError
from distcurv.wire.messages import Message


class ThreadOwned:
    """Binds an object to the first thread that calls `enter`; any other thread is refused."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._thread: int | None = None

    def enter(self) -> None:
        """Raise `LinkError` unless the calling thread is the one that owns this link."""
        if os.getpid() != self._process:
            raise LinkError(
                f"{type(self).__name__} was made in process {self._process} and entered in "
                f"process {os.getpid()}: links do not survive a fork, spawn processes instead"
            )
        current = threading.get_ident()
        if self._thread is None:
            self._thread = current
        elif self._thread != current:
            raise LinkError(
                f"{type(self).__name__} belongs to thread {self._thread} and was entered from "
                f"thread {current} ({threading.current_thread().name}): only its I/O thread may"
            )


class Link(Protocol):
    """The owner's end of one session with one worker."""

    endpoint: str

    def send(self, message: Message) -> bool:
        """Queue a message.  False when it cannot be queued now; never blocks.

        The message's tensors belong to the link from here on and must not be written to."""
        ...

    def receive(self, timeout: float) -> Message | None:
        """The next message, or None after ``timeout`` seconds or when woken.

        Raises `ProtocolError` when what came is no valid message."""
        ...

    def wake(self) -> None:
        """Make a waiting `receive` return.  Safe from any thread."""
        ...

    def close(self) -> None:
        """End the session at once; idempotent."""
        ...


class Incoming(NamedTuple):
    """What a server received: a valid message, or why the bytes were refused."""

    peer: bytes
    content: Message | ProtocolError
    nbytes: int


class Server(Protocol):
    """The worker's end: many peers, each named by an opaque byte string."""

    endpoint: str

    def receive(self, timeout: float) -> Incoming | None:
        """The next message or refusal of any peer; None after ``timeout`` s or when woken."""
        ...

    def send(self, peer: bytes, message: Message) -> bool:
        """Queue a message for a peer.  False when the peer is gone or its queue is full."""
        ...

    def drop(self, peer: bytes) -> None:
        """Forget a peer: whatever it still sends is ignored."""
        ...

    def wake(self) -> None:
        """Make a waiting `receive` return.  Safe from any thread."""
        ...

    def close(self) -> None:
        """Release the endpoint; idempotent."""
        ...
