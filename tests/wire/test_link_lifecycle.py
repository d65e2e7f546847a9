"""How every link meets peers that go, misbehave or return, and threads that may not enter."""

from __future__ import annotations

import pytest
import zmq
from link_rig import DEADLINE, Rig, in_thread, put, take, take_reply, until
from wire_messages import SESSION, statistics

from distcurv.errors import EndpointError, LinkError, ProtocolError
from distcurv.wire import Limits, zmq_link
from distcurv.wire.memory import MemoryServer
from distcurv.wire.messages import Goodbye, Heartbeat


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


def test_a_dropped_peer_that_floods_does_not_hold_the_server(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = rig.server()
    server.drop(b"flood")
    if isinstance(server, MemoryServer):
        monkeypatch.setattr(server.inbox, "get", lambda deadline: (b"flood", [b"x"]))
    else:
        endless = [zmq.Frame(b"flood"), zmq.Frame(b"x")]
        monkeypatch.setattr(zmq_link, "_receive", lambda socket, waker, deadline: endless)
    assert server.receive(0.01) is None


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


def test_last_words_are_received_after_close(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_link, "LINGER_MS", 30_000)  # whatever the machine is busy with
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
