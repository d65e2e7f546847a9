"""How every link carries messages, asked of every scheme in the registry."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest
import torch
from link_rig import DEADLINE, Rig, fill, in_thread, put, take, take_reply, until
from wire_messages import SAMPLES, SESSION, same, statistics

from distcurv.wire import LINKS, SERVERS, Limits
from distcurv.wire.codec import encode
from distcurv.wire.messages import Goodbye, Seed, Statistics

KINDS = sorted(SAMPLES)
MIB = 2**20


def test_every_scheme_has_both_ends() -> None:
    assert set(LINKS) == set(SERVERS)


def test_every_kind_travels_both_ways(rig: Rig) -> None:
    server = rig.server()
    link = rig.link(server)
    for kind in KINDS:
        put(link, SAMPLES[kind])
        incoming = take(server)
        assert same(incoming.content, SAMPLES[kind])
        assert incoming.nbytes == sum(len(f) for f in encode(SAMPLES[kind], Limits()))
        assert server.send(incoming.peer, SAMPLES[kind])
        assert same(take_reply(link), SAMPLES[kind])


def test_order_is_kept_under_back_pressure(rig: Rig) -> None:
    server = rig.server()
    link = rig.link(server)
    seqs: list[int] = []

    def drain() -> None:
        while (incoming := server.receive(0)) is not None:
            seqs.append(incoming.content.seq)

    put(link, statistics(0))
    for seq in range(1, 500):
        while not link.send(statistics(seq, numbers=1000)):
            drain()
    while len(seqs) < 500:
        seqs.append(take(server).content.seq)
    assert seqs == list(range(500))


def test_big_payloads(rig: Rig) -> None:
    server = rig.server()
    link = rig.link(server)
    payload = torch.arange(16 * MIB, dtype=torch.float32)
    message = Statistics(SESSION, 1, 0, 0, [0], [0], payload)
    put(link, message)
    incoming = take(server)
    assert same(incoming.content, message)
    assert incoming.nbytes > 64 * MIB
    assert server.send(incoming.peer, Seed(SESSION, [0], [1], [1], incoming.content.payload))
    assert torch.equal(take_reply(link).payload, payload)


def test_empty_payloads(rig: Rig) -> None:
    server = rig.server()
    put(rig.link(server), Seed(SESSION, [], [], [], torch.empty(0)))
    assert take(server).content.payload.shape == (0,)


def test_a_sent_payload_lives_until_it_is_received_and_no_longer(rig: Rig) -> None:
    server = rig.server()
    link = rig.link(server)
    put(link, Goodbye(SESSION, "connected"))
    take(server)
    payload = torch.full((2 * MIB,), 3.0)
    storage = weakref.ref(payload.untyped_storage())
    alive = weakref.ref(payload)
    assert link.send(Statistics(SESSION, 1, 0, 0, [0], [0], payload))
    del payload
    gc.collect()
    _scribble = [torch.full((2 * MIB,), 9.0) for _ in range(3)]  # would take freed memory
    incoming = take(server)
    assert torch.equal(incoming.content.payload, torch.full((2 * MIB,), 3.0))
    del incoming
    until(lambda: alive() is None and storage() is None)


def test_receive_gives_none_after_its_timeout(rig: Rig) -> None:
    server = rig.server()
    link = rig.link(server)
    for end in (server, link):
        assert end.receive(0) is None
        started = time.monotonic()
        assert end.receive(0.05) is None
        assert time.monotonic() - started >= 0.049


@pytest.mark.parametrize("which", ["server", "link"])
def test_wake_ends_a_receive(rig: Rig, which: str) -> None:
    server = rig.server()
    link = rig.link(server)
    end = server if which == "server" else link
    entered = threading.Event()

    def wait() -> object:
        entered.set()
        got = end.receive(100 * DEADLINE)
        end.close()  # by the thread that owns it
        return got

    with in_thread(wait) as result:
        assert entered.wait(DEADLINE)
        end.wake()
        assert result() is None


@pytest.mark.parametrize("which", ["server", "link"])
def test_wakes_before_a_receive_end_only_the_next_one(rig: Rig, which: str) -> None:
    server = rig.server()
    end = server if which == "server" else rig.link(server)
    for _ in range(100_000):  # more than any pipe holds
        end.wake()
    assert end.receive(100 * DEADLINE) is None
    started = time.monotonic()
    assert end.receive(0.05) is None
    assert time.monotonic() - started >= 0.049


def test_a_wake_loses_no_message(rig: Rig) -> None:
    server = rig.server()
    link = rig.link(server)
    put(link, statistics(0))
    for seq in range(1, 5):
        assert link.send(statistics(seq))
    server.wake()
    assert [take(server).content.seq for _ in range(5)] == list(range(5))


def test_send_is_refused_instead_of_waiting(rig: Rig) -> None:
    server = rig.server()
    link = rig.link(server)
    put(link, Goodbye(SESSION, "connected"))
    take(server)
    sent = fill(lambda seq: link.send(statistics(seq, numbers=MIB // 4)))
    assert sent > 0
    assert [take(server).content.seq for _ in range(sent)] == list(range(sent))
    assert server.receive(0.05) is None
    put(link, statistics(sent))
    assert take(server).content.seq == sent


def test_a_server_is_refused_instead_of_waiting_for_one_peer(rig: Rig) -> None:
    server = rig.server()
    slow, quick = rig.link(server), rig.link(server)
    peers = []
    for link in (slow, quick):
        put(link, statistics(0))
        peers.append(take(server).peer)
    sent = fill(lambda seq: server.send(peers[0], statistics(seq, numbers=MIB // 4)))
    assert sent > 0
    assert server.send(peers[1], statistics(7))
    assert take_reply(quick).seq == 7
    assert [take_reply(slow).seq for _ in range(sent)] == list(range(sent))


def test_peers_are_told_apart(rig: Rig) -> None:
    server = rig.server()
    links = [rig.link(server) for _ in range(3)]
    peers = {}
    for number, link in enumerate(links):
        put(link, statistics(number))
    for _ in links:
        incoming = take(server)
        peers[incoming.content.seq] = incoming.peer
    assert len(set(peers.values())) == 3
    for number in (2, 0, 1):
        assert server.send(peers[number], statistics(10 + number))
    assert [take_reply(link).seq for link in links] == [10, 11, 12]
