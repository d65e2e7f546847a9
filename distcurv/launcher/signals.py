"""Collects signals instead of dying from them, so that one loop can end things in order."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self


class SignalBox:
    """While entered, SIGINT, SIGTERM and SIGHUP are only noted in ``received``, oldest first.

    Main thread only (Python allows no other to install handlers).  A SIGHUP that was ignored
    before, as under nohup, stays ignored."""

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signum is signal.SIGHUP and signal.getsignal(signum) is signal.SIG_IGN:
                continue
            self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before.clear()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received.append(signal.Signals(signum))
