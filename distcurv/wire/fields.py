"""Which fields each kind of message has: the table that the codec believes, no other.

A new kind of message is one dataclass in ``messages`` and one entry in `RULES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distcurv.wire.checks import Bool, Bytes, Check, Float, Floats, Int, Ints, Maps, Text
from distcurv.wire.messages import (
    Ack,
    Error,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    Published,
    Seed,
    Statistics,
    Welcome,
)


@dataclass(frozen=True)
class Payload:
    """A tensor of one of these dtype codes and exactly ``ndim`` dimensions; see ``codec``."""

    codes: tuple[str, ...] = ("f4",)
    ndim: int = 1


@dataclass(frozen=True)
class Rule:
    """One kind of message: its class, its fields, and the lists as long as ``blocks``."""

    make: type[Message]
    fields: Mapping[str, Check | Payload]
    beside: tuple[str, ...] = ()


_SIDE: dict[str, Check] = {
    "dim": Int(1),
    "rank": Int(),
    "tail": Text(),
    "encoding": Text(),
    "units": Int(1),
}

_BLOCK: dict[str, Check] = {
    "name": Text(1024),
    "kind": Text(),
    "sides": Maps(_SIDE, most=8),
    "decay": Float(0.0),
    "damping": Float(0.0),
    "relative_damping": Bool(),
    "power": Float(0.0),
    "max_itr": Int(),
    "tolerance": Float(0.0),
    "wire_dtype": Text(),
}

_SESSION = Bytes((16,))
_NARROW = Payload(("f2",))

RULES: dict[str, Rule] = {
    "hello": Rule(
        Hello,
        {
            "protocol": Int(),
            "job": Bytes((16,)),
            "session": _SESSION,
            "generation": Int(),
            "owner": Int(),
            "table_hash": Bytes((32,)),
            "blocks": Maps(_BLOCK),
        },
    ),
    "welcome": Rule(Welcome, {"session": _SESSION, "pid": Int(), "device": Text()}),
    "seed": Rule(
        Seed,
        {
            "session": _SESSION,
            "blocks": Ints(),
            "versions": Ints(),
            "based_on": Ints(-1),
            "payload": Payload(),
        },
        beside=("versions", "based_on"),
    ),
    "statistics": Rule(
        Statistics,
        {
            "session": _SESSION,
            "seq": Int(),
            "since": Int(),
            "through": Int(),
            "blocks": Ints(),
            "basis": Ints(),
            "payload": Payload(),
            "narrow": _NARROW,
        },
        beside=("basis",),
    ),
    "ack": Rule(
        Ack,
        {
            "session": _SESSION,
            "what": Text(words=("statistics", "published")),
            "blocks": Ints(),
            "numbers": Ints(),
        },
        beside=("numbers",),
    ),
    "published": Rule(
        Published,
        {
            "session": _SESSION,
            "blocks": Ints(),
            "versions": Ints(),
            "based_on": Ints(-1),
            "seqs": Ints(),
            "uncaptured": Floats(),
            "innovation": Floats(),
            "seconds": Float(0.0),
            "payload": Payload(),
            "narrow": _NARROW,
        },
        beside=("versions", "based_on", "seqs", "uncaptured", "innovation"),
    ),
    "heartbeat": Rule(Heartbeat, {"session": _SESSION, "busy": Float(0.0), "queued": Int()}),
    "goodbye": Rule(Goodbye, {"session": _SESSION, "reason": Text(1024)}),
    "error": Rule(
        Error,
        {
            "session": Bytes((0, 16)),
            "code": Text(),
            "text": Text(16_384),
            "blocks": Ints(),
            "seq": Int(-1),
        },
    ),
}
