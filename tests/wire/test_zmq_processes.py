"""Links between processes that end, stop or are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from link_rig import DEADLINE, Rig, put, take, take_reply, until
from wire_messages import statistics

PREAMBLE = """
import sys, threading
import torch
from distcurv.wire import bind, connect
from distcurv.wire.messages import Statistics
def message(seq, numbers):
    return Statistics(bytes(16), seq, 0, 1, [0], [0], torch.zeros(numbers))
def say(word):
    print(word, flush=True)
"""

SERVE = """
server = bind(sys.argv[1])
say(server.endpoint)
while True:
    incoming = server.receive(3600.0)
    if incoming is not None:
        server.send(incoming.peer, incoming.content)
"""

LEAVE = """
full = threading.Event()
def flood(link):
    while link.send(message(1, 1 << 20)):
        pass
def connected(endpoint):
    link = connect(endpoint)
    while not link.send(message(0, 1)):
        link.receive(0.01)
    return link
def flood_and_wait():
    link = connected(sys.argv[1])
    flood(link)
    full.set()
    while True:
        link.receive(3600.0)

to_stopped = connected(sys.argv[2])
while to_stopped.receive(3600.0) is None:
    pass
say("connected")
sys.stdin.readline()
flood(to_stopped)
still_open = connected(sys.argv[1])
flood(still_open)
closed = connected(sys.argv[1])
flood(closed)
closed.close()
nobody = connect("tcp://127.0.0.1:9")
assert not nobody.send(message(0, 1 << 20))
threading.Thread(target=flood_and_wait, daemon=True).start()
full.wait()
say("full")
"""


@contextmanager
def process(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that is gone at the end, whatever happened."""
    child = subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield child
    finally:
        child.kill()
        child.wait(DEADLINE)
        assert child.stdin is not None and child.stdout is not None
        child.stdin.close()
        child.stdout.close()


def line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def test_a_process_with_unsent_messages_ends(tcp_rig: Rig) -> None:
    """Links to a peer that never reads (open, closed, and one that a thread waits on), to one
    that is stopped, and to nobody."""
    patience = 50.0  # seconds; less than after what zmq gives up the peer that is stopped
    never_reads = tcp_rig.server()
    with ExitStack() as stack:
        server = stack.enter_context(process(SERVE, "tcp://127.0.0.1:0"))
        child = stack.enter_context(process(LEAVE, never_reads.endpoint, line(server)))
        assert line(child) == "connected"
        os.kill(server.pid, signal.SIGSTOP)
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
        assert line(child) == "full"
        assert child.wait(patience) == 0


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
def test_the_place_of_a_killed_server_can_be_bound_at_once(scheme: str, tmp_path: Path) -> None:
    rig = Rig(scheme, tmp_path)
    with rig.stack, process(SERVE, rig.place) as child:
        endpoint = line(child)
        link = rig.link(endpoint)
        put(link, statistics(1))
        assert take_reply(link).seq == 1
        child.kill()
        child.wait(DEADLINE)
        server = rig.server(endpoint)
        assert server.endpoint == endpoint
        fresh = rig.link(server)
        put(fresh, statistics(2))
        assert take(server).content.seq == 2
        until(lambda: link.send(statistics(3)) or link.receive(0.01))
        assert take(server).content.seq == 3
