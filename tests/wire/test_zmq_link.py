"""What only sockets can do to a link: half messages, foreign bytes, dead and stopped peers."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from link_rig import Rig, put, take
from wire_messages import statistics
from zmtp_peer import ZmtpPeer, frame

from distcurv.errors import EndpointError, ProtocolError
from distcurv.wire import Limits, zmq_link
from distcurv.wire.codec import encode
from distcurv.wire.messages import Statistics
from distcurv.wire.zmq_link import _CONTEXTS, ZmqServer, _context


def raw(seq: int, numbers: int = 100_000) -> tuple[bytes, bytes]:
    header, payload, narrow = encode(statistics(seq, numbers), Limits())
    assert not len(narrow)
    return bytes(header), bytes(payload)


def whole(header: bytes, payload: bytes) -> bytes:
    return frame(header, more=True) + frame(payload, more=True) + frame(b"")


def half_payload(header: bytes, payload: bytes) -> bytes:
    half = frame(payload[: len(payload) // 2], more=True, declared=len(payload))
    return frame(header, more=True) + half


def header_only(header: bytes, payload: bytes) -> bytes:
    return frame(header, more=True)


def half_header(header: bytes, payload: bytes) -> bytes:
    return frame(header[: len(header) // 2], more=True, declared=len(header))


def test_the_raw_peer_is_understood(tcp_rig: Rig) -> None:
    """Without this, the tests below could pass because the peer never got anywhere."""
    server = tcp_rig.server()
    peer = ZmtpPeer(server.endpoint)
    peer.send(whole(*raw(1)))
    assert take(server).content.seq == 1
    peer.socket.close()


@pytest.mark.parametrize("part", [half_payload, header_only, half_header])
@pytest.mark.parametrize("die", [True, False], ids=["dies", "hangs"])
def test_half_a_message_is_never_delivered(
    tcp_rig: Rig, part: Callable[[bytes, bytes], bytes], die: bool
) -> None:
    server = tcp_rig.server()
    link = tcp_rig.link(server)
    peer = ZmtpPeer(server.endpoint)
    tcp_rig.stack.callback(peer.socket.close)
    peer.send(frame(b"\xc1"))  # shows that the server hears this peer
    assert isinstance(take(server).content, ProtocolError)
    peer.send(part(*raw(1)))
    if die:
        peer.die()
    for seq in range(2, 6):
        put(link, statistics(seq))
        assert take(server).content.seq == seq
    assert server.receive(0.2) is None


def test_a_whole_message_of_a_peer_that_died_is_delivered_alone(tcp_rig: Rig) -> None:
    server = tcp_rig.server()
    peer = ZmtpPeer(server.endpoint)
    peer.send(whole(*raw(1)) + half_payload(*raw(2)))
    assert take(server).content.seq == 1
    peer.die()
    assert server.receive(0.3) is None


def test_an_oversized_frame_ends_its_connection(tcp_rig: Rig) -> None:
    limits = Limits(header_bytes=10_000, payload_bytes=500_000)
    server = tcp_rig.server(limits=limits)
    link = tcp_rig.link(server)
    for declared in (500_001, 2**40, 2**63 - 1):
        peer = ZmtpPeer(server.endpoint)
        peer.send(frame(b"", declared=declared))
        assert peer.dropped()
        peer.socket.close()
    put(link, statistics(1))
    assert take(server).content.seq == 1
    assert server.receive(0.1) is None


def test_a_frame_within_the_limit_but_no_message_is_refused_with_its_size(tcp_rig: Rig) -> None:
    server = tcp_rig.server(limits=Limits(header_bytes=10_000, payload_bytes=500_000))
    peer = ZmtpPeer(server.endpoint)
    peer.send(frame(bytes(400_000)))
    incoming = take(server)
    assert incoming.nbytes == 400_000
    assert isinstance(incoming.content, ProtocolError)
    assert incoming.content.code == "header_too_large"
    peer.socket.close()


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: worker\r\nUser-Agent: curious\r\nAccept: */*\r\n\r\n" * 3,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 2,
        bytes(1000),
        b"\xff" * 1000,
        b"\xff" + bytes(8) + b"\x7f" + b"\x63" * 200,
        b"\x01\x00" + b"\x05\x00abcd" * 10,
        b"x",
    ],
    ids=["http", "tls", "zeros", "ones", "greeting-of-the-future", "zmtp-1", "one-byte"],
)
def test_foreign_bytes_do_no_harm(tcp_rig: Rig, garbage: bytes) -> None:
    server = tcp_rig.server()
    link = tcp_rig.link(server)
    put(link, statistics(1))
    assert take(server).content.seq == 1
    stranger = ZmtpPeer(server.endpoint, shake_hands=False)
    stranger.send(garbage)
    stranger.end_sending()
    assert stranger.dropped()
    stranger.socket.close()
    put(link, statistics(2))
    while not isinstance((incoming := take(server)).content, Statistics):
        assert isinstance(incoming.content, ProtocolError)  # old ZMTP frames anything
    assert incoming.content.seq == 2


def test_what_is_queued_at_close_is_still_sent(
    tcp_rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zmq_link, "LINGER_MS", 30_000)  # whatever the machine is busy with
    server = tcp_rig.server()
    link = tcp_rig.link(server)
    put(link, statistics(1))
    assert take(server).content.seq == 1
    assert link.send(statistics(2, numbers=2**23))
    assert link.send(statistics(3))
    link.close()
    assert [take(server).content.seq for _ in range(2)] == [2, 3]


def test_a_public_address_is_not_bound(tmp_path: Path) -> None:
    for endpoint in ("tcp://0.0.0.0:0", "tcp://192.0.2.1:5555", "tcp://[::]:0", "tcp://node1:0"):
        with pytest.raises(EndpointError, match="CURVE"):
            ZmqServer(endpoint)


def test_localhost_and_ipv6_are_bound(tmp_path: Path) -> None:
    endpoints = ["tcp://localhost:0"]
    with socket.socket(socket.AF_INET6) as probe:
        if probe.connect_ex(("::1", 9)) != 99:  # EADDRNOTAVAIL: this machine has no IPv6
            endpoints.append("tcp://[::1]:0")
    for endpoint in endpoints:
        rig = Rig("tcp", tmp_path)
        with rig.stack:
            server = rig.server(endpoint)
            assert not server.endpoint.endswith(":0")
            put(rig.link(server), statistics(1))
            assert take(server).content.seq == 1


def test_only_the_user_may_connect_to_a_socket_file(tmp_path: Path) -> None:
    rig = Rig("ipc", tmp_path)
    with rig.stack:
        server = rig.server()
        mode = os.stat(server.endpoint.removeprefix("ipc://")).st_mode
        assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o600


def test_a_file_is_not_taken_for_a_socket(tmp_path: Path) -> None:
    path = tmp_path / "results"
    path.write_text("of a long run")
    with pytest.raises(EndpointError, match="no socket"):
        ZmqServer(f"ipc://{path}")
    assert path.read_text() == "of a long run"


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match="missing"):
        ZmqServer(f"ipc://{tmp_path}/missing/s", patience=0.0)


def test_a_forked_process_gets_its_own_context(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = _context()
    assert _context() is mine
    monkeypatch.setattr(os, "getpid", lambda: -1)
    other = _context()
    assert other is not mine
    other.term()
    del _CONTEXTS[-1]
