"""Where a worker listens, as text: parsed and refused here, before any socket is opened.

| endpoint | |
|---|---|
| ``tcp://HOST:PORT`` | HOST is a name, an IPv4 address or an IPv6 address in brackets |
| ``ipc://PATH`` | an absolute path of a Unix socket |
| ``memory://NAME`` | a server in this process |

To bind, port 0 (or an empty memory name) means: choose one.  To connect it is refused.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from distcurv.errors import EndpointError

SCHEMES = ("tcp", "ipc", "memory")

_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_MEMORY = re.compile(r"[A-Za-z0-9_.-]*")
_DIGITS = re.compile(r"[0-9]{1,5}")
_SOCKET_PATH_BYTES = 107  # sun_path of Linux, less its end


@dataclass(frozen=True)
class Endpoint:
    """A parsed endpoint.  ``str()`` gives the text that zmq and users know it by."""

    scheme: str
    address: str  # host without brackets, path, or name
    port: int = 0  # tcp only

    def __str__(self) -> str:
        if self.scheme != "tcp":
            return f"{self.scheme}://{self.address}"
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"tcp://{host}:{self.port}"

    @property
    def ip(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
        """The address of a tcp endpoint where it is a number, not a name."""
        return _ip(self.address) if self.scheme == "tcp" else None


def parse_endpoint(text: str) -> Endpoint:
    """Parse an endpoint; raises `EndpointError` that says what is wrong with it."""
    scheme, found, address = text.partition("://")
    if not found or scheme not in SCHEMES:
        raise _refused(text, f"it must start with {', '.join(s + '://' for s in SCHEMES)}")
    if scheme == "tcp":
        return _parse_tcp(text, address)
    if scheme == "ipc":
        return _parse_ipc(text, address)
    if not _MEMORY.fullmatch(address):
        raise _refused(text, "a name has only letters, digits, '.', '_' and '-'")
    return Endpoint("memory", address)


def parse_connectable(text: str) -> Endpoint:
    """Parse an endpoint that a link is to connect to: it must name one place."""
    endpoint = parse_endpoint(text)
    if endpoint.scheme == "tcp" and endpoint.port == 0:
        raise _refused(text, "port 0 is only for binding; use the endpoint the worker printed")
    if endpoint.ip is not None and endpoint.ip.is_unspecified:
        raise _refused(text, "this address means 'all of mine'; name the worker's host")
    if not endpoint.address:
        raise _refused(text, "the name is missing")
    return endpoint


def is_loopback(endpoint: Endpoint) -> bool:
    """Whether only processes of this machine can reach it."""
    if endpoint.scheme != "tcp" or endpoint.address == "localhost":
        return True
    return endpoint.ip is not None and endpoint.ip.is_loopback


def refuse_public_bind(endpoint: Endpoint) -> None:
    """Raise `EndpointError` when other machines could connect to this bind."""
    if not is_loopback(endpoint):
        raise _refused(
            str(endpoint),
            "other machines could reach it and encryption (CURVE keys) is not available yet; "
            "bind tcp://127.0.0.1:PORT, tcp://[::1]:PORT or ipc://PATH "
            "(an SSH tunnel to that reaches other machines)",
        )


def _parse_tcp(text: str, address: str) -> Endpoint:
    host, colon, port = address.rpartition(":")
    if not colon or not _DIGITS.fullmatch(port) or int(port) > 65_535:
        raise _refused(text, "a port from 0 to 65535 is due at the end: tcp://HOST:PORT")
    if host == "*":
        raise _refused(text, "the wildcard * is all addresses of this machine; name one")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if ":" not in host or _ip(host) is None:
            raise _refused(text, f"{host!r} is no IPv6 address")
    elif not _HOST.fullmatch(host):
        raise _refused(text, "HOST is no name or address (IPv6 stands in brackets: [::1])")
    elif host.replace(".", "").isdigit() and _ip(host) is None:
        raise _refused(text, f"{host!r} is no IPv4 address")
    return Endpoint("tcp", host, int(port))


def _parse_ipc(text: str, path: str) -> Endpoint:
    if not path.startswith("/"):
        raise _refused(text, "the path must be absolute: it has to mean the same for every process")
    if not path.isprintable():
        raise _refused(text, "the path holds characters that cannot be printed")
    if len(path.encode()) > _SOCKET_PATH_BYTES:
        raise _refused(text, f"a socket's path has at most {_SOCKET_PATH_BYTES} bytes")
    return Endpoint("ipc", path)


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:  # a name; what is no name either, _HOST refuses
        return None


def _refused(text: str, why: str) -> EndpointError:
    return EndpointError(f"endpoint {text!r}: {why}")
