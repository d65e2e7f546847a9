"""Messages for tests: one plain sample of each kind, and a strategy for each kind of the table."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st

from distcurv.wire import checks
from distcurv.wire.codec import DTYPES, Buffer
from distcurv.wire.fields import RULES, Payload
from distcurv.wire.messages import (
    PROTOCOL,
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

LIMITS = checks.Limits(entries=100, header_bytes=100_000, payload_bytes=100_000)
SESSION = bytes(range(16))
SIDE = {"dim": 65, "rank": 16, "tail": "isotropic", "encoding": "sketch", "units": 1}
BLOCK = {
    "name": "encoder.0",
    "kind": "kfac",
    "sides": [SIDE, SIDE],
    "decay": 0.95,
    "damping": 1e-3,
    "relative_damping": False,
    "power": 0.25,
    "max_itr": 3,
    "tolerance": 1e-3,
    "wire_dtype": "float16",
}

NARROW = torch.tensor([1.5, -2.0, 3.0], dtype=torch.float16)
SAMPLES: dict[str, Message] = {
    "hello": Hello(PROTOCOL, b"j" * 16, SESSION, 0, 1, b"h" * 32, [BLOCK, BLOCK]),
    "welcome": Welcome(SESSION, 4711, "cuda:0"),
    "seed": Seed(SESSION, [0, 1], [3, 4], [-1, 20], torch.arange(5.0)),
    "statistics": Statistics(SESSION, 7, 10, 19, [0, 1], [3, 3], torch.arange(6.0), NARROW),
    "ack": Ack(SESSION, "statistics", [0, 1], [7, 7]),
    "published": Published(
        SESSION,
        [0, 1],
        [4, 5],
        [19, 19],
        [7, 7],
        [0.1, 0.2],
        [-1.0, 0.5],
        0.01,
        torch.arange(3.0),
        NARROW,
    ),
    "heartbeat": Heartbeat(SESSION, 0.25, 3),
    "goodbye": Goodbye(SESSION, "done"),
    "error": Error(b"", "no_session", "say Hello first", [1], 7),
}


def statistics(seq: int, numbers: int = 4) -> Statistics:
    """A statistics message that is told from others by its seq."""
    return Statistics(SESSION, seq, 0, 1, [0], [0], torch.full((numbers,), float(seq)))


def plain(frames: list[Buffer]) -> list[bytes]:
    """The frames as they would come out of a socket."""
    return [bytes(frame) for frame in frames]


def same(one: Message, other: Message) -> bool:
    """Equal in kind and every field; tensors by their bits."""
    if type(one) is not type(other):
        return False
    for name, value in vars(one).items():
        theirs = vars(other)[name]
        if isinstance(value, torch.Tensor):
            if value.dtype != theirs.dtype or value.shape != theirs.shape:
                return False
            if not torch.equal(value.view(torch.uint8), theirs.view(torch.uint8)):
                return False
        elif value != theirs or type(value) is not type(theirs):
            return False
    return True


def _values(check: Any, length: int) -> st.SearchStrategy[Any]:
    """Everything that a check lets through; lists beside ``blocks`` have ``length`` entries."""
    finite = st.floats(allow_nan=False, allow_infinity=False)
    ints = st.integers(getattr(check, "low", 0), checks.INT_MAX) if _has_int(check) else None
    match check:
        case checks.Int():
            return ints
        case checks.Ints():
            return st.lists(ints, min_size=length, max_size=length)
        case checks.Float():
            return finite.filter(lambda value: value >= check.low)
        case checks.Floats():
            return st.lists(finite, min_size=length, max_size=length)
        case checks.Bool():
            return st.booleans()
        case checks.Text():
            return st.sampled_from(check.words) if check.words else st.text(max_size=12)
        case checks.Bytes():
            return st.sampled_from(check.lengths).flatmap(
                lambda size: st.binary(min_size=size, max_size=size)
            )
        case checks.Maps():
            fields = {key: _values(inner, 0) for key, inner in check.fields.items()}
            return st.lists(st.fixed_dictionaries(fields), max_size=3)
        case Payload():
            (code,) = check.codes
            return st.binary(max_size=64).map(partial(_numbers_of, DTYPES[code]))
    raise AssertionError(f"no strategy for {check}: add one")


def _has_int(check: Any) -> bool:
    return isinstance(check, checks.Int | checks.Ints)


def _numbers_of(dtype: torch.dtype, raw: bytes) -> torch.Tensor:
    """Any bit patterns, infinities and NaNs among them: the codec does not look into payloads."""
    whole = raw[: len(raw) // dtype.itemsize * dtype.itemsize]
    return torch.frombuffer(bytearray(whole), dtype=dtype) if whole else torch.empty(0, dtype=dtype)


@st.composite
def messages(draw: st.DrawFn, kind: str) -> Message:
    """Any valid message of a kind."""
    rule = RULES[kind]
    length = draw(st.integers(0, 4))
    values = {name: draw(_values(check, length)) for name, check in rule.fields.items()}
    if "protocol" in values:
        values["protocol"] = PROTOCOL
    return rule.make(**values)
