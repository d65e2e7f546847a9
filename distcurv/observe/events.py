"""Writes down what happens, one JSON line per event, so that a run can be looked at afterwards.

Every process of a run appends to a file of its own, ``<directory>/<who>.jsonl``; nothing is
shared, so nothing can be torn.  `distcurv.observe.merge` joins the files by time.  The calling
thread only encodes the line (a few microseconds); a daemon thread writes, so that neither a slow
disk nor a full one holds up a training step.
"""

from __future__ import annotations

import atexit
import json
import logging
import math
import os
import re
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Protocol

from distcurv.errors import ConfigError

DIRECTORY_VARIABLE = "DISTCURV_EVENTS"
"""Environment variable that names the directory; unset or empty means that nothing is written."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_log = logging.getLogger("distcurv.events")


class Events(Protocol):
    """What components are given: call it to emit, close it when the process ends."""

    def __call__(self, kind: str, /, **fields: object) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class EventWriter:
    """Appends events to ``<directory>/<who>.jsonl``; may be called from any thread.

    Each line is one JSON object: ``t`` (``time.monotonic_ns()``, one clock for all processes of
    a machine), ``who``, ``kind`` and the event's own fields.  Non-finite floats become null.
    Lines reach the file within ``period`` seconds, at `flush`, at `close` and at interpreter
    exit; a process that is killed loses at most the last period.

    Args:
        directory: made if it does not exist.
        who: ``rank0``, ``worker0`` and alike; becomes the file's name.
        period: seconds between writes.
        capacity: lines that may wait while the disk does not take them; what comes after that
            is not kept but counted, and an event of kind ``warning`` says how many were lost.

    Raises:
        ConfigError: ``who`` cannot be a file name, or the directory cannot be written.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        who: str,
        *,
        period: float = 0.25,
        capacity: int = 100_000,
    ) -> None:
        if not _NAME.fullmatch(who):
            raise ConfigError(
                f"EventWriter.who is {who!r}: use letters, digits, '_', '.' and '-' only"
            )
        self.who = who
        self.path = Path(directory) / f"{who}.jsonl"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # O_APPEND and whole lines per write: two writers of one name do not tear each other.
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise ConfigError(
                f"EventWriter cannot write {self.path}: {error.strerror}; "
                f"give a directory that can be written ({DIRECTORY_VARIABLE})"
            ) from error
        self._period = period
        self._capacity = capacity
        self._lines: list[str] = []
        self._lost = 0
        self._broken = False
        self._lock = threading.Lock()  # guards _lines and _lost; held for an append only
        self._write_lock = threading.Lock()  # guards the file
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(
            target=self._write_now_and_then, name=f"distcurv-events-{who}", daemon=True
        )
        self._thread.start()
        atexit.register(self.close)

    def __call__(self, kind: str, /, **fields: object) -> None:
        """Records one event.  Fields are JSON values; ``t``, ``who`` and ``kind`` are ours.

        Raises:
            TypeError: a field is no JSON value (that is a mistake at the place of the call).
        """
        now = time.monotonic_ns()
        event = {"t": now, "who": self.who, "kind": kind, **fields}
        try:
            line = json.dumps(event, separators=(",", ":"), allow_nan=False)
        except ValueError:
            line = json.dumps(_finite(event), separators=(",", ":"), allow_nan=False)
        with self._lock:
            if self._closed or len(self._lines) >= self._capacity:
                self._lost += 1
            else:
                self._lines.append(line)

    def flush(self) -> None:
        """Writes what has been recorded so far; returns when the system has it."""
        with self._write_lock:
            with self._lock:
                lines, self._lines = self._lines, []
                lost, self._lost = self._lost, 0
            if lost:
                text = f"{lost} events were lost: the disk was slower than they came"
                warning = {"t": time.monotonic_ns(), "who": self.who, "kind": "warning"}
                lines.append(json.dumps({**warning, "text": text}, separators=(",", ":")))
            if not lines or self._broken:
                return
            data = memoryview(("\n".join(lines) + "\n").encode())
            try:
                while data:
                    data = data[os.write(self._file, data) :]
            except OSError as error:
                # Training must not die for its diary: say so once, and write no more.
                self._broken = True
                _log.warning("events of %s are no longer written: %s", self.who, error)

    def close(self) -> None:
        """Writes the rest and ends the thread.  Events that come later are not kept."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self.close)
        self._wake.set()
        self._thread.join()
        self.flush()
        with self._write_lock:
            self._broken = True  # the number of a closed file may soon be somebody else's
            os.close(self._file)

    def __enter__(self) -> EventWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _write_now_and_then(self) -> None:
        while not self._wake.wait(self._period):
            self.flush()


class _NoEvents:
    """Takes everything, keeps nothing."""

    def __call__(self, kind: str, /, **fields: object) -> None:
        return

    def flush(self) -> None:
        return

    def close(self) -> None:
        return


no_events: Events = _NoEvents()


def from_environment(who: str) -> Events:
    """An `EventWriter` on the directory that ``DISTCURV_EVENTS`` names, else `no_events`."""
    directory = os.environ.get(DIRECTORY_VARIABLE, "")
    return EventWriter(directory, who) if directory else no_events


def _finite(value: object) -> object:
    """``value`` with every non-finite float replaced by None, which JSON can say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
