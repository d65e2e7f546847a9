"""Endpoints: what is understood, what is refused and with which words."""

from __future__ import annotations

import pytest

from distcurv.errors import EndpointError
from distcurv.wire import LINKS, SERVERS, bind, connect
from distcurv.wire.endpoints import (
    SCHEMES,
    Endpoint,
    is_loopback,
    parse_connectable,
    parse_endpoint,
    refuse_public_bind,
)


def test_the_registries_know_what_is_parsed() -> None:
    assert set(SCHEMES) == set(LINKS) == set(SERVERS)


@pytest.mark.parametrize(
    ("text", "parsed", "loopback"),
    [
        ("tcp://127.0.0.1:5555", Endpoint("tcp", "127.0.0.1", 5555), True),
        ("tcp://127.8.7.6:0", Endpoint("tcp", "127.8.7.6", 0), True),
        ("tcp://localhost:1", Endpoint("tcp", "localhost", 1), True),
        ("tcp://[::1]:65535", Endpoint("tcp", "::1", 65535), True),
        ("tcp://node-01.cluster_a:5555", Endpoint("tcp", "node-01.cluster_a", 5555), False),
        ("tcp://localhost.evil.example:1", Endpoint("tcp", "localhost.evil.example", 1), False),
        ("tcp://10.0.0.1:5555", Endpoint("tcp", "10.0.0.1", 5555), False),
        ("tcp://0.0.0.0:5555", Endpoint("tcp", "0.0.0.0", 5555), False),
        ("tcp://[::]:5555", Endpoint("tcp", "::", 5555), False),
        ("tcp://[2001:db8::1]:5555", Endpoint("tcp", "2001:db8::1", 5555), False),
        ("ipc:///tmp/worker 0.sock", Endpoint("ipc", "/tmp/worker 0.sock"), True),
        ("memory://worker-0", Endpoint("memory", "worker-0"), True),
        ("memory://", Endpoint("memory", ""), True),
    ],
)
def test_endpoints(text: str, parsed: Endpoint, loopback: bool) -> None:
    endpoint = parse_endpoint(text)
    assert endpoint == parsed
    assert str(endpoint) == text
    assert is_loopback(endpoint) is loopback
    if loopback:
        refuse_public_bind(endpoint)
    else:
        with pytest.raises(EndpointError, match=r"CURVE.* not available"):
            refuse_public_bind(endpoint)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "must start with"),
        ("127.0.0.1:5555", "must start with"),
        ("http://127.0.0.1:5555", "must start with"),
        ("TCP://127.0.0.1:5555", "must start with"),
        ("tcp:127.0.0.1:5555", "must start with"),
        (" tcp://127.0.0.1:5555", "must start with"),
        ("tcp://127.0.0.1", "port"),
        ("tcp://127.0.0.1:", "port"),
        ("tcp://127.0.0.1:65536", "port"),
        ("tcp://127.0.0.1:-1", "port"),
        ("tcp://127.0.0.1:5555 ", "port"),
        ("tcp://127.0.0.1:*", "port"),
        ("tcp://127.0.0.1:٣", "port"),
        ("tcp://*:5555", "wildcard"),
        ("tcp://:5555", "no name"),
        ("tcp://::1:5555", "brackets"),
        ("tcp://[::1:5555", "no name"),
        ("tcp://[127.0.0.1]:5555", "IPv6"),
        ("tcp://[::g]:5555", "IPv6"),
        ("tcp://127.1:5555", "IPv4"),
        ("tcp://300.0.0.1:5555", "IPv4"),
        ("tcp://a;b:5555", "no name"),
        ("tcp://eth0;127.0.0.1:5555", "no name"),
        ("tcp://user@host:5555", "no name"),
        ("ipc://", "absolute"),
        ("ipc://worker.sock", "absolute"),
        ("ipc://*", "absolute"),
        ("ipc://@worker", "absolute"),
        ("ipc:///tmp/a\nb", "printed"),
        ("ipc:///tmp/a\0b", "printed"),
        ("ipc:///" + "x" * 107, "107 bytes"),
        ("memory://a/b", "letters"),
    ],
)
def test_refused_endpoints(text: str, why: str) -> None:
    for use in (parse_endpoint, bind, connect):
        with pytest.raises(EndpointError, match=why) as caught:
            use(text)
        assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("tcp://127.0.0.1:0", "port 0"),
        ("tcp://0.0.0.0:5555", "all of mine"),
        ("tcp://[::]:5555", "all of mine"),
        ("memory://", "name is missing"),
    ],
)
def test_endpoints_that_only_servers_may_have(text: str, why: str) -> None:
    parse_endpoint(text)
    for use in (parse_connectable, connect):
        with pytest.raises(EndpointError, match=why):
            use(text)
