"""A pipe that tells a child that its launcher is gone, even when the launcher was SIGKILLed.

The launcher holds the only write end and never writes; the kernel closes it with the process, and
every child then reads end-of-file.  A forked copy of the launcher would keep the pipe open, and a
stopped child cannot read, so on Linux a worker also asks the kernel to be killed with its parent.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


class Lifeline:
    """The launcher's end.  Hand ``child_fd`` to children by ``pass_fds``; `close` lets go."""

    def __init__(self) -> None:
        self.child_fd, self._own_fd = os.pipe()
        self._open = True

    def close(self) -> None:
        """Children see end-of-file from now on; idempotent."""
        if self._open:
            self._open = False
            os.close(self._own_fd)
            os.close(self.child_fd)


def hold(child_fd: int, lost: Callable[[], object]) -> None:
    """In a child: call ``lost`` on a thread of its own once the launcher is gone."""
    os.set_inheritable(child_fd, False)

    def watch() -> None:
        while os.read(child_fd, 1):
            pass
        lost()

    threading.Thread(target=watch, name="distcurv-lifeline", daemon=True).start()


def die_with_parent() -> None:
    """In a child, on Linux: be SIGKILLed when the thread that started this process ends."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")
