"""Links by scheme.  A new link is one file with a link and a server, and one line in each table.

server = bind("tcp://127.0.0.1:0")
link = connect(server.endpoint)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from distcurv.wire.checks import Limits
from distcurv.wire.endpoints import parse_connectable, parse_endpoint
from distcurv.wire.link import Link, Server
from distcurv.wire.memory import MemoryLink, MemoryServer
from distcurv.wire.zmq_link import ZmqLink, ZmqServer

LINKS: Mapping[str, Callable[[str, Limits], Link]] = {
    "memory": MemoryLink,
    "tcp": ZmqLink,
    "ipc": ZmqLink,
}

SERVERS: Mapping[str, Callable[[str, Limits], Server]] = {
    "memory": MemoryServer,
    "tcp": ZmqServer,
    "ipc": ZmqServer,
}


def connect(endpoint: str, limits: Limits | None = None) -> Link:
    """A new link to a server, which need not be there yet.  Raises EndpointError."""
    return LINKS[parse_connectable(endpoint).scheme](endpoint, limits or Limits())


def bind(endpoint: str, limits: Limits | None = None) -> Server:
    """A new server; its ``endpoint`` is what links connect to.  Raises EndpointError."""
    return SERVERS[parse_endpoint(endpoint).scheme](endpoint, limits or Limits())


__all__ = ["LINKS", "SERVERS", "Limits", "Link", "Server", "bind", "connect"]
