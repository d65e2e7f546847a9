"""A clock that waits for the device, and the conditions under which it may be believed.

A CPU that moves a thread between cores, or torch's own threads, change a time by more than what
is compared; so timed work runs on one core with one thread.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Cores:
    """Where training and worker run; None where cores cannot be chosen (not on Linux)."""

    training: int | None
    worker: int | None


def choose_cores() -> Cores:
    """The first of the usable cores for training, the second (or only) one for the worker."""
    if not hasattr(os, "sched_getaffinity"):
        return Cores(None, None)
    usable = sorted(os.sched_getaffinity(0))
    return Cores(usable[0], usable[1] if len(usable) > 1 else usable[0])


@contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """The calling thread, and what it starts, stays on one core for the body."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes with one CPU thread for the body."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronise(device: str) -> None:
    """Wait until the device has done what was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()


def now(device: str) -> float:
    """Seconds, once the device has done what was asked of it."""
    synchronise(device)
    return time.perf_counter()


def work_time(device: str) -> float:
    """Seconds of work so far: processor time of this process, on CUDA wall time.

    For work that waits for nothing both are the same on a quiet core; on a busy one, processor
    time leaves out what others take."""
    return now(device) if device == "cuda" else time.process_time()


def peak_memory(device: str) -> int:
    """Bytes: the largest resident size of this process so far, on CUDA of its tensors there."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        # Not from getrusage, which on Linux also remembers the size of whoever started us.
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
