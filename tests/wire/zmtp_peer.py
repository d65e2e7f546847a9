"""A peer that speaks ZMTP 3.0 byte by byte, so that it can stop or lie in the middle.

Reference: https://rfc.zeromq.org/spec/23/ (greeting, NULL mechanism, READY, framing).
"""

from __future__ import annotations

import contextlib
import socket
import struct

# Seconds; zmq ends a connection by itself whose handshake takes 30.
PATIENCE = 25.0
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)


def frame(body: bytes, more: bool = False, declared: int | None = None) -> bytes:
    """One frame in the long form; ``declared`` is the length it claims to have."""
    size = len(body) if declared is None else declared
    return bytes([0x02 | more]) + struct.pack(">Q", size) + body


class ZmtpPeer:
    """A raw TCP connection to a ROUTER, past the handshake."""

    def __init__(self, endpoint: str, shake_hands: bool = True) -> None:
        host, port = endpoint.removeprefix("tcp://").rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)), timeout=PATIENCE)
        if shake_hands:
            self.socket.sendall(GREETING)
            ready = (
                b"\x05READY" + _property(b"Socket-Type", b"DEALER") + _property(b"Identity", b"")
            )
            self.socket.sendall(bytes([0x04, len(ready)]) + ready)
            assert self._exactly(64).startswith(b"\xff")
            flags, size = self._exactly(2)
            assert flags == 0x04 and self._exactly(size).startswith(b"\x05READY")

    def send(self, raw: bytes) -> None:
        self.socket.sendall(raw)

    def end_sending(self) -> None:
        with contextlib.suppress(OSError):  # the other side may have ended it all by now
            self.socket.shutdown(socket.SHUT_WR)

    def dropped(self) -> bool:
        """Wait until the other side ends the connection."""
        with contextlib.suppress(ConnectionResetError):
            while self.socket.recv(4096):
                pass
        return True

    def die(self) -> None:
        """End as a killed process does: with a reset, so that nothing is flushed."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def _exactly(self, size: int) -> bytes:
        got = b""
        while len(got) < size:
            more = self.socket.recv(size - len(got))
            assert more, "the server ended the handshake"
            got += more
        return got


def _property(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + struct.pack(">I", len(value)) + value
