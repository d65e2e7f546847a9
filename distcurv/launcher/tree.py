"""Finds and ends a process together with everything that it started.

torchrun gives every training rank a session of its own, so a process group does not hold them all;
the parent ids do, as long as orphans are handed to the root instead of to init (`adopt_orphans`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict

_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.02


def adopt_orphans() -> None:
    """On Linux: descendants whose parent dies become children of this process, not of init."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_CHILD_SUBREAPER): {os.strerror(error)}")


def descendants(root: int) -> list[int]:
    """Ids of the living processes below ``root``, which itself is not among them."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    for pid, parent in _living():
        children[parent].append(pid)
    found: list[int] = []
    waiting = [root]
    while waiting:
        below = children[waiting.pop()]
        found.extend(below)
        waiting.extend(below)
    return found


def end_descendants(root: int, grace: float) -> None:
    """End everything below ``root``: SIGTERM, and SIGKILL after ``grace`` seconds."""
    deadline = time.monotonic() + grace
    asked: set[int] = set()
    while (below := descendants(root)) and time.monotonic() < deadline:
        for pid in set(below) - asked:
            _send(pid, signal.SIGTERM)
            asked.add(pid)
        time.sleep(_POLL_S)
    _kill_descendants(root)


def kill(root: int) -> None:
    """SIGKILL ``root`` and everything below it."""
    # Stopped first, so that it can neither start anything nor leave orphans before its turn.
    _send(root, signal.SIGSTOP)
    _kill_descendants(root)
    _send(root, signal.SIGKILL)


def _kill_descendants(root: int, patience: float = 2.0) -> None:
    deadline = time.monotonic() + patience
    # More than once: a process may fork between the look and the blow.  SIGKILL itself can be
    # delayed by a process in uninterruptible sleep, hence the deadline.
    while (below := descendants(root)) and time.monotonic() < deadline:
        for pid in below:
            _send(pid, signal.SIGKILL)
        time.sleep(_POLL_S)


def _send(pid: int, signum: signal.Signals) -> None:
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        return  # it ended by itself in the meantime, which is what is wanted


def _living() -> list[tuple[int, int]]:
    """(pid, parent pid) of every process that is not a zombie."""
    return _living_by_proc() if sys.platform == "linux" else _living_by_ps()


def _living_by_ps() -> list[tuple[int, int]]:
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,state="], capture_output=True, text=True, check=True
    )
    rows = [line.split() for line in listed.stdout.splitlines()]
    return [(int(pid), int(parent)) for pid, parent, state in rows if not state.startswith("Z")]


def _living_by_proc() -> list[tuple[int, int]]:
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                text = file.read()
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended between listing and reading
        # "pid (name) state parent ...": the name may hold spaces and brackets.
        state, parent = text.rpartition(b")")[2].split()[:2]
        if state not in (b"Z", b"X"):
            found.append((int(name), int(parent)))
    return found
