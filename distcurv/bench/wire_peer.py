"""The far end of `bench wire`: answers at once, so that the link is all that is measured.

As a thread for the in-memory link, else as a process (``python -m distcurv.bench.wire_peer``).
The raw variant does the same with pyzmq alone: no table of fields, no checks, no sessions.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time

import torch
import zmq

from distcurv.launcher import lifeline
from distcurv.wire import Server, bind
from distcurv.wire.messages import Ack, Goodbye, Heartbeat, Message, Published, Statistics

SESSION = bytes(16)
_WAIT_S = 1.0
# Orders of the raw variant, as its first frame.
ECHO, TAKE, GIVE, END = b"echo", b"take", b"give", b"end"


def answer(server: Server) -> None:
    """Serve until Goodbye: Heartbeat comes back, Statistics is acknowledged, and an Ack of
    ``published`` number n is answered with a preconditioner of n float32 numbers."""
    payload = torch.empty(0)
    while True:
        got = server.receive(_WAIT_S)
        if got is None:
            continue
        message = got.content
        if isinstance(message, Goodbye):
            return
        if isinstance(message, Heartbeat):
            _reply(server, got.peer, message)
        elif isinstance(message, Statistics):
            _reply(server, got.peer, Ack(SESSION, "statistics", [0], [message.seq]))
        elif isinstance(message, Ack):
            size = message.numbers[0]
            if payload.numel() != size:
                payload = torch.ones(size)
            published = Published(SESSION, [0], [1], [0], [0], [0.0], [0.0], 0.0, payload)
            _reply(server, got.peer, published)


def _reply(server: Server, peer: bytes, message: Message) -> None:
    """Queue an answer, however often that takes: zmq learns late that its queue has emptied."""
    while not server.send(peer, message):
        time.sleep(0)


def answer_raw(socket: zmq.Socket[bytes]) -> None:
    """The same with a bare ROUTER and frames that hold what they hold."""
    payload = b""
    while True:
        peer, order, *frames = socket.recv_multipart(copy=False)
        word = order.bytes
        if word == END:
            return
        if word == GIVE:
            size = int(frames[0].bytes)
            if len(payload) != size:
                payload = bytes(size)
            socket.send_multipart([peer, order, payload], copy=False)
        else:
            socket.send_multipart([peer, order])


def raw_router(endpoint: str) -> tuple[zmq.Socket[bytes], str]:
    """A bound ROUTER and where it is."""
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    socket.set(zmq.LINGER, 0)
    socket.bind(endpoint)
    return socket, socket.get_string(zmq.LAST_ENDPOINT)


def main(link: str, raw: bool) -> int:
    """Bind, print the endpoint, answer until the end."""
    lifeline.die_with_parent()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="distcurv-bench-") as folder:
        place = f"ipc://{os.path.join(folder, 'peer')}" if link == "ipc" else "tcp://127.0.0.1:0"
        if raw:
            socket, endpoint = raw_router(place)
            print(endpoint, flush=True)
            answer_raw(socket)
            socket.close()
        else:
            server = bind(place)
            print(server.endpoint, flush=True)
            answer(server)
            server.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:] == ["raw"]))
