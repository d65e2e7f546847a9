"""A file descriptor that any thread can make readable, to end another thread's poll."""

from __future__ import annotations

import contextlib
import socket
import threading


class Waker:
    """``set`` from any thread makes ``fileno()`` readable until ``clear``."""

    def __init__(self) -> None:
        self._out, self._in = socket.socketpair()
        self._out.setblocking(False)
        self._in.setblocking(False)
        self._lock = threading.Lock()  # a set that meets a close must not hit a reused number
        self._closed = False

    def fileno(self) -> int:
        """The descriptor to poll for reading."""
        return self._out.fileno()

    def set(self) -> None:
        """Wake.  Does nothing after `close`."""
        with self._lock:
            if not self._closed:
                # A full buffer means that it is readable already.
                with contextlib.suppress(BlockingIOError):
                    self._in.send(b"\0")

    def clear(self) -> None:
        """Take back every `set` so far."""
        with contextlib.suppress(BlockingIOError):
            while self._out.recv(4096):
                pass

    def close(self) -> None:
        """Release both descriptors; idempotent."""
        with self._lock:
            self._closed = True
            self._out.close()
            self._in.close()
