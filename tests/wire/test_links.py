"""What every link promises (``wire/link.py``), asked of every scheme in the registry."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from link_rig import DEADLINE, Rig, in_thread, put, take, take_reply, until
from wire_messages import SAMPLES, SESSION, same, statistics

from distcurv.errors import EndpointError, LinkError, ProtocolError
from distcurv.wire import LINKS, SERVERS, Limits
from distcurv.wire.codec import encode
from distcurv.wire.messages import Goodbye, Heartbeat, Seed, Statistics

KINDS = sorted(SAMPLES)
MIB = 2**20


@pytest.fixture(params=sorted(SERVERS))
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(request.param, tmp_path)
    with rig.stack:
        yield rig


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
    put(link, statistics(0))
    sent = 1
    while link.send(statistics(sent, numbers=MIB // 4)):
        sent += 1
        assert sent < 500, "1 MiB messages are queued without end"
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
    sent = 0
    while server.send(peers[0], statistics(sent, numbers=MIB // 4)):
        sent += 1
        assert sent < 500, "1 MiB messages are queued without end"
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


def test_a_dropped_peer_is_heard_no_more(rig: Rig) -> None:
    server = rig.server()
    bad, good = rig.link(server), rig.link(server)
    put(bad, statistics(1))
    peer = take(server).peer
    assert bad.send(statistics(2))
    server.drop(peer)
    assert not server.send(peer, statistics(3))
    assert bad.send(statistics(4))
    put(good, statistics(5))
    assert take(server).content.seq == 5
    assert server.receive(0.2) is None
    server.drop(peer)
    server.drop(b"never seen")


def test_a_peer_that_vanished_can_not_be_sent_to(rig: Rig) -> None:
    server = rig.server()
    link = rig.link(server)
    put(link, statistics(1))
    peer = take(server).peer
    link.close()
    until(lambda: not server.send(peer, Heartbeat(SESSION, 0.0, 0)))
    assert not server.send(b"never seen", Heartbeat(SESSION, 0.0, 0))
    put(rig.link(server), statistics(2))
    assert take(server).content.seq == 2


def test_last_words_are_received_after_close(rig: Rig) -> None:
    server = rig.server()
    link = rig.link(server)
    put(link, statistics(1))
    assert link.send(Goodbye(SESSION, "done"))
    link.close()
    assert take(server).content.seq == 1
    assert take(server).content == Goodbye(SESSION, "done")


def test_without_a_server_nothing_is_queued(rig: Rig) -> None:
    server = rig.server()
    server.close()
    link = rig.link(server)
    assert not link.send(statistics(1))
    assert link.receive(0.05) is None
    assert not link.send(statistics(2))
    again = rig.server(server.endpoint)
    put(link, statistics(3))
    assert take(again).content.seq == 3


def test_a_restarted_server_has_the_place_it_had(rig: Rig) -> None:
    server = rig.server()
    old = rig.link(server)
    put(old, statistics(1))
    take(server)
    server.close()
    for number in range(5):
        again = rig.server(server.endpoint)
        assert again.endpoint == server.endpoint
        link = rig.link(again)
        put(link, statistics(number))
        assert take(again).content.seq == number
        link.close()
        if number < 4:
            again.close()
    until(lambda: old.send(statistics(9)) or old.receive(0.01))  # the old link finds it too
    assert take(again).content.seq == 9


def test_messages_that_are_none_are_refused_and_the_server_lives(rig: Rig) -> None:
    server = rig.server()
    link = rig.link(server)
    put(link, statistics(1))
    peer = take(server).peer
    for frames in ([b"\xc1"], [b""], [b"\x91" * 5000], [b"\x80", b"x" * 1000]):
        rig.inject(server, frames)
        incoming = take(server)
        assert isinstance(incoming.content, ProtocolError)
        assert incoming.peer != peer
        assert incoming.nbytes == sum(map(len, frames))
        server.drop(incoming.peer)
    put(link, statistics(2))
    assert take(server).content.seq == 2
    assert server.send(peer, statistics(3))
    assert take_reply(link).seq == 3


def test_a_link_raises_what_was_wrong_and_goes_on(rig: Rig) -> None:
    server = rig.server()
    link = rig.link(server)
    put(link, statistics(1))
    peer = take(server).peer
    rig.inject_reply(server, peer, link, [b"\xc1"])
    with pytest.raises(ProtocolError, match="malformed"):
        link.receive(DEADLINE)
    assert server.send(peer, statistics(2))
    assert take_reply(link).seq == 2


def test_a_message_beyond_the_limits_is_not_sent(rig: Rig) -> None:
    server = rig.server(limits=Limits(payload_bytes=1000))
    link = rig.link(server)
    put(link, statistics(1))
    peer = take(server).peer
    with pytest.raises(ProtocolError, match="too_large"):
        server.send(peer, statistics(1, numbers=1000))


def test_another_thread_is_refused(rig: Rig) -> None:
    server = rig.server()
    link = rig.link(server)
    put(link, statistics(1))
    peer = take(server).peer
    for work in (
        lambda: link.send(statistics(2)),
        lambda: link.receive(0),
        link.close,
        lambda: server.send(peer, statistics(3)),
        lambda: server.receive(0),
        lambda: server.drop(peer),
        server.close,
    ):
        with in_thread(work) as result, pytest.raises(LinkError, match="belongs to thread"):
            result()
    assert link.send(statistics(4))
    assert take(server).content.seq == 4


def test_both_ends_may_be_made_in_another_thread(rig: Rig) -> None:
    with in_thread(rig.server) as made:
        server = made()
    with in_thread(lambda: rig.link(server)) as made:
        link = made()
    put(link, statistics(1))
    assert take(server).content.seq == 1


def test_another_process_is_refused(rig: Rig) -> None:
    server = rig.server()
    link = rig.link(server)
    for end in (link, server):
        end._process, mine = -1, end._process
        with pytest.raises(LinkError, match="fork"):
            end.receive(0)
        end._process = mine


def test_close_is_idempotent_and_ends_all_use(rig: Rig) -> None:
    server = rig.server()
    link = rig.link(server)
    put(link, statistics(1))
    peer = take(server).peer
    for end in (link, server):
        end.close()
        end.close()
        end.wake()
        with pytest.raises(LinkError, match="closed"):
            end.receive(0)
    with pytest.raises(LinkError, match="closed"):
        link.send(statistics(2))
    with pytest.raises(LinkError, match="closed"):
        server.send(peer, statistics(2))
    with pytest.raises(LinkError, match="closed"):
        server.drop(peer)


def test_links_that_were_never_used_close(rig: Rig) -> None:
    server = rig.server()
    rig.link(server).close()
    server.close()


def test_a_taken_place_is_refused(rig: Rig) -> None:
    server = rig.server()
    with pytest.raises(EndpointError, match=r"taken|cannot be bound"):
        type(server)(server.endpoint, **({} if rig.scheme == "memory" else {"patience": 0.1}))
    put(rig.link(server), statistics(1))
    assert take(server).content.seq == 1
