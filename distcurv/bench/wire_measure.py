"""Sends and asks over one link and takes the time; the near end of `bench wire`.

Latency: a small message there and back, alone.  Throughput: payloads in one direction, each
answered by a small message, with `WINDOW` of them under way.  The processor time is that of both
ends together, over the bytes of the payloads.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import zmq

from distcurv.bench.clock import pinned
from distcurv.bench.summary import times
from distcurv.bench.wire_peer import ECHO, END, GIVE, SESSION, TAKE, answer
from distcurv.errors import LaunchError, LinkError
from distcurv.wire import Link, bind, connect
from distcurv.wire.messages import Ack, Goodbye, Heartbeat, Statistics

WINDOW = 4
PEER_THREAD = "distcurv-bench-peer"
_PATIENCE_S = 30.0


class Line(Protocol):
    """A way to the peer; each `send` of one of the three is answered by one `take`."""

    def echo(self) -> None: ...

    def statistics(self, numbers: int) -> None: ...

    def order(self, numbers: int) -> None: ...

    def take(self) -> None: ...

    def end(self) -> None: ...


class OverLink:
    """Through distcurv's messages, codec and link."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._payload = torch.empty(0)
        self._seq = 0

    def echo(self) -> None:
        """A small message, to be sent back."""
        self._send(Heartbeat(SESSION, 0.0, 0))

    def statistics(self, numbers: int) -> None:
        """A statistic of so many float32 numbers, to be acknowledged."""
        if self._payload.numel() != numbers:
            self._payload = torch.ones(numbers)
        self._seq += 1
        self._send(Statistics(SESSION, self._seq, 0, 0, [0], [0], self._payload))

    def order(self, numbers: int) -> None:
        """Ask for a preconditioner of so many float32 numbers."""
        self._send(Ack(SESSION, "published", [0], [numbers]))

    def take(self) -> None:
        """Wait for the next answer; raises `LinkError` when none comes."""
        if self._link.receive(_PATIENCE_S) is None:
            raise LinkError(f"the peer of bench wire was silent for {_PATIENCE_S:g} s")

    def end(self) -> None:
        """Send the peer home."""
        self._send(Goodbye(SESSION, "measured"))
        self._link.close()

    def _send(self, message: Any) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not self._link.send(message):  # no connection yet, or the queue looks full
            if time.monotonic() > deadline:
                raise LinkError("the peer of bench wire could not be reached")
            time.sleep(0)


class RawZmq:
    """Through a bare DEALER."""

    def __init__(self, endpoint: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, int(1000 * _PATIENCE_S))  # the peer waits for the end
        self._socket.set(zmq.RCVTIMEO, int(1000 * _PATIENCE_S))
        self._socket.connect(endpoint)
        self._payload = b""

    def echo(self) -> None:
        """As `OverLink.echo`."""
        self._socket.send_multipart([ECHO])

    def statistics(self, numbers: int) -> None:
        """As `OverLink.statistics`."""
        if len(self._payload) != 4 * numbers:
            self._payload = bytes(4 * numbers)
        self._socket.send_multipart([TAKE, self._payload], copy=False)

    def order(self, numbers: int) -> None:
        """As `OverLink.order`."""
        self._socket.send_multipart([GIVE, b"%d" % (4 * numbers)])

    def take(self) -> None:
        """As `OverLink.take`."""
        self._socket.recv_multipart(copy=False)

    def end(self) -> None:
        """As `OverLink.end`."""
        self._socket.send_multipart([END])
        self._socket.close()


@dataclass
class Way:
    """A line, and the processor seconds that both its ends have used so far (None: unknown)."""

    line: Line
    cpu: Callable[[], float | None]


@contextmanager
def in_memory() -> Iterator[Way]:
    """The in-memory link to a thread of this process."""
    server = bind("memory://")

    def serve() -> None:
        answer(server)
        server.close()

    thread = threading.Thread(target=serve, name=PEER_THREAD, daemon=True)
    thread.start()
    way = Way(OverLink(connect(server.endpoint)), time.process_time)
    try:
        yield way
    finally:
        way.line.end()
        thread.join(_PATIENCE_S)


@contextmanager
def to_process(scheme: str, raw: bool, core: int | None) -> Iterator[Way]:
    """A zmq link to a process on another core.

    Raises:
        LaunchError: the process did not come up."""
    command = [sys.executable, "-m", "distcurv.bench.wire_peer", scheme, *(["raw"] if raw else [])]
    with pinned(core):
        peer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert peer.stdout is not None
        endpoint = peer.stdout.readline().strip()
        if not endpoint:
            raise LaunchError("the peer of bench wire ended at once: see its message above")
        line: Line = RawZmq(endpoint) if raw else OverLink(connect(endpoint))

        def cpu() -> float | None:
            theirs = process_seconds(peer.pid)
            return None if theirs is None else time.process_time() + theirs

        yield Way(line, cpu)
        line.end()
        peer.wait(_PATIENCE_S)
    finally:
        peer.kill()
        peer.wait()
        if peer.stdout is not None:
            peer.stdout.close()


def process_seconds(pid: int) -> float | None:
    """Processor seconds of another process, from its clock; None where the system has none.

    The number of that clock is ``(~pid << 3) | 2``, see clock_getcpuclockid(3) of Linux."""
    if not sys.platform.startswith("linux"):
        return None
    return time.clock_gettime((~pid << 3) | 2)


def round_trips(way: Way, count: int) -> dict[str, float | int]:
    """Microseconds for a small message there and back."""
    taken = []
    for trip in range(count + 10):
        start = time.perf_counter()
        way.line.echo()
        way.line.take()
        if trip >= 10:  # the first ones connect
            taken.append(1e6 * (time.perf_counter() - start))
    return times(taken)


def throughput(way: Way, numbers: int, messages: int, what: str) -> dict[str, Any]:
    """``messages`` payloads of ``numbers`` float32, ``what`` is statistics or preconditioners."""
    send = way.line.statistics if what == "statistics" else way.line.order
    send(numbers)
    way.line.take()  # buffers are made
    nbytes = 4 * numbers * messages
    cpu, start = way.cpu(), time.perf_counter()
    for index in range(messages):
        if index >= WINDOW:
            way.line.take()
        send(numbers)
    for _ in range(min(WINDOW, messages)):
        way.line.take()
    seconds, cpu_now = time.perf_counter() - start, way.cpu()
    used = None if cpu is None or cpu_now is None else cpu_now - cpu
    return {
        "gb_per_s": nbytes / seconds / 1e9,
        "cpu_s_per_gb": None if used is None else used / nbytes * 1e9,
    }


def memory_copy(numbers: int, times_: int) -> dict[str, Any]:
    """What copying the same bytes once costs."""
    source, target = torch.ones(numbers), torch.empty(numbers)
    target.copy_(source)
    cpu, start = time.process_time(), time.perf_counter()
    for _ in range(times_):
        target.copy_(source)
    nbytes = 4 * numbers * times_
    seconds = time.perf_counter() - start
    return {
        "gb_per_s": nbytes / seconds / 1e9,
        "cpu_s_per_gb": (time.process_time() - cpu) / nbytes * 1e9,
    }
