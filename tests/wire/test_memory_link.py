"""What only the in-process link can promise: no copies, and names of its own choice."""

from __future__ import annotations

from pathlib import Path

from link_rig import Rig, put, take, take_reply
from wire_messages import SAMPLES, statistics

from distcurv.wire.memory import MemoryServer


def test_payloads_are_handed_over_without_a_copy(tmp_path: Path) -> None:
    rig = Rig("memory", tmp_path)
    with rig.stack:
        server = rig.server()
        link = rig.link(server)
        put(link, SAMPLES["statistics"])
        incoming = take(server)
        assert incoming.content.payload.data_ptr() == SAMPLES["statistics"].payload.data_ptr()
        assert server.send(incoming.peer, SAMPLES["seed"])
        assert take_reply(link).payload.data_ptr() == SAMPLES["seed"].payload.data_ptr()


def test_servers_without_a_name_get_different_ones(tmp_path: Path) -> None:
    rig = Rig("memory", tmp_path)
    with rig.stack:
        assert rig.server().endpoint != rig.server().endpoint


def test_links_that_closed_leave_nothing_behind(tmp_path: Path) -> None:
    rig = Rig("memory", tmp_path)
    with rig.stack:
        server = rig.server()
        assert isinstance(server, MemoryServer)
        for seq in range(3):
            link = rig.link(server)
            put(link, statistics(seq))
            link.close()
            assert take(server).content.seq == seq
        assert not server._peers
