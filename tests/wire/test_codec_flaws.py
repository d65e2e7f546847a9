"""Bytes that are no message: each flaw has its code, and no bytes do more than be refused."""

from __future__ import annotations

import inspect
import re
import struct
import tracemalloc
from collections.abc import Callable

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_messages import BLOCK, LIMITS, SAMPLES, SIDE, messages, plain, same

from distcurv.errors import ProtocolError
from distcurv.wire import checks, codec, fields
from distcurv.wire.checks import Limits
from distcurv.wire.codec import decode, encode
from distcurv.wire.fields import RULES
from distcurv.wire.messages import PROTOCOL

KINDS = sorted(RULES)

# --- each code of the table in codec's docstring -------------------------------------------

Frames = list[bytes]
Case = Callable[[], Frames]


def changed(sample: str, frames: int | None = None, **values: object) -> Case:
    """The sample's frames with fields replaced in the header."""

    def make() -> Frames:
        valid = plain(encode(SAMPLES[sample], LIMITS))
        header = {**msgpack.unpackb(valid[0]), **values}
        return [msgpack.packb(header), *valid[1:]][:frames]

    return make


def tensor(code: object = "<f4", shape: object = (5,), index: object = 1) -> Case:
    return changed("seed", payload=[code, shape, index])


def narrow(code: str = "f2", shape: object = (3,), index: object = 2) -> Case:
    """The second tensor of a statistic."""
    return changed("statistics", narrow=[codec._ORDER + code, shape, index])


def without(kind: str, field: str) -> Case:
    def make() -> Frames:
        valid = plain(encode(SAMPLES[kind], LIMITS))
        header = msgpack.unpackb(valid[0])
        del header[field]
        return [msgpack.packb(header), *valid[1:]]

    return make


def raw(*frames: bytes) -> Case:
    return lambda: list(frames)


def block(**values: object) -> Case:
    return changed("hello", blocks=[{**BLOCK, **values}])


def twice() -> Frames:
    session = msgpack.packb("session") + msgpack.packb(b"s" * 16)
    others = [msgpack.packb(word) for word in ("kind", "goodbye", "reason", "")]
    return [b"\x84" + session + session + b"".join(others)]


ARRAY_OF_4G = b"\xdd\xff\xff\xff\xff"

CASES: list[tuple[str, Case]] = [
    ("no_frames", raw()),
    ("header_too_large", raw(b"\xc4" * 100_001)),
    ("truncated", raw(b"")),
    ("truncated", raw(encode(SAMPLES["ack"], LIMITS)[0][:-1])),
    ("trailing_bytes", raw(encode(SAMPLES["ack"], LIMITS)[0] + b"\xc0")),
    ("malformed", raw(b"\xc1")),
    ("malformed", raw(msgpack.packb([1, 2]))),
    ("malformed", raw(msgpack.packb({"kind": msgpack.ExtType(5, b"abc")}))),
    ("malformed", raw(msgpack.packb({1: 2}))),
    ("malformed", raw(b"\x81\xa4kind\xa2\xff\xff")),
    ("malformed", raw(b"\x81\x90\xc0")),
    ("truncated", raw(ARRAY_OF_4G)),
    ("too_deep", raw(b"\x91" * 50_000)),
    ("too_deep", raw(b"\x81\xa1a" * 30_000)),
    ("wrong_type", raw(msgpack.packb({"kind": "goodbye", "session": b"s" * 16, "reason": [[]]}))),
    ("duplicate_field", twice),
    ("missing_field", without("ack", "numbers")),
    ("missing_field", changed("hello", blocks=[{}])),
    ("missing_field", without("statistics", "narrow")),
    ("missing_field", without("published", "narrow")),
    ("unknown_field", changed("ack", more=1)),
    ("unknown_field", block(__class__="x")),
    ("unknown_field", block(sides=[{**SIDE, "more": 1}])),
    ("unknown_kind", changed("ack", kind="pickle")),
    ("unknown_kind", changed("ack", kind=["ack"])),
    ("unknown_kind", without("ack", "kind")),
    ("wrong_protocol", changed("hello", protocol=PROTOCOL + 1)),
    ("wrong_protocol", changed("hello", protocol=PROTOCOL + 1, field_of_tomorrow=1)),
    ("wrong_protocol", without("hello", "protocol")),
    ("wrong_protocol", changed("hello", protocol=True)),
    ("wrong_type", changed("welcome", pid=True)),
    ("wrong_type", changed("welcome", pid=1.0)),
    ("wrong_type", changed("welcome", pid="1")),
    ("wrong_type", changed("welcome", device=b"cpu")),
    ("wrong_type", changed("welcome", session="s" * 16)),
    ("wrong_type", changed("heartbeat", busy=True)),
    ("wrong_type", changed("heartbeat", busy=None)),
    ("wrong_type", changed("ack", blocks=[0, True])),
    ("wrong_type", changed("ack", blocks=[0, 1.0])),
    ("wrong_type", changed("ack", blocks={})),
    ("wrong_type", changed("published", uncaptured=[0.1, "x"])),
    ("wrong_type", changed("seed", payload=None)),
    ("wrong_type", block(relative_damping=0)),
    ("wrong_type", block(power="0.25")),
    ("out_of_range", block(power=-0.25)),
    ("wrong_type", block(max_itr=1.0)),
    ("out_of_range", block(max_itr=-1)),
    ("wrong_type", block(tolerance="0")),
    ("out_of_range", block(tolerance=-1.0)),
    ("wrong_type", block(wire_dtype=16)),
    ("wrong_type", block(sides=[[1, 2]])),
    ("wrong_type", changed("statistics", narrow=None)),
    ("wrong_type", changed("hello", blocks=["x"])),
    ("wrong_type", tensor(index=True)),
    ("out_of_range", changed("welcome", pid=-1)),
    ("out_of_range", changed("welcome", pid=2**63)),
    ("out_of_range", changed("ack", blocks=[0, -1])),
    ("out_of_range", changed("ack", blocks=[0, 2**64 - 1])),
    ("out_of_range", changed("ack", what="pickles")),
    ("out_of_range", changed("seed", based_on=[0, -2])),
    ("out_of_range", changed("heartbeat", busy=-0.1)),
    ("out_of_range", block(sides=[{**SIDE, "rank": -1}])),
    ("non_finite", changed("heartbeat", busy=float("nan"))),
    ("non_finite", changed("published", innovation=[0.1, float("inf")])),
    ("non_finite", block(decay=float("-inf"))),
    ("wrong_length", changed("welcome", session=b"s" * 15)),
    ("wrong_length", changed("error", session=b"s" * 8)),
    ("wrong_length", changed("hello", table_hash=b"")),
    ("wrong_length", changed("welcome", device="x" * 65)),
    ("wrong_length", changed("statistics", basis=[3])),
    ("wrong_length", changed("published", innovation=[0.1, 0.2, 0.3])),
    ("too_many", changed("ack", blocks=[0] * 101, numbers=[0] * 101)),
    ("too_many", block(sides=[SIDE] * 9)),
    ("unknown_dtype", tensor(code="<i8")),
    ("unknown_dtype", tensor(code="float32")),
    ("unknown_dtype", tensor(code=">f4" if codec._ORDER == "<" else "<f4")),
    ("wrong_dtype", tensor(code=codec._ORDER + "f8")),
    ("wrong_dtype", tensor(code=codec._ORDER + "f2")),
    ("wrong_dtype", narrow(code="f4")),
    ("wrong_dtype", narrow(code="bf16")),
    ("wrong_shape", tensor(shape=[])),
    ("wrong_shape", tensor(shape=[5, 1])),
    ("wrong_shape", tensor(shape=[-5])),
    ("wrong_shape", tensor(shape=[2**63])),
    ("wrong_shape", tensor(shape=[True])),
    ("wrong_shape", tensor(shape=["5"])),
    ("wrong_shape", tensor(shape=[2**62] * 4)),
    ("wrong_nbytes", tensor(shape=[4])),
    ("wrong_nbytes", tensor(shape=[6])),
    ("wrong_nbytes", tensor(shape=[0])),
    ("wrong_nbytes", narrow(shape=[2])),
    ("wrong_nbytes", narrow(index=1)),
    ("too_large", tensor(shape=[25_001])),
    ("too_large", tensor(shape=[2**62])),
    ("missing_frame", tensor(index=2)),
    ("missing_frame", tensor(index=0)),
    ("missing_frame", tensor(index=-1)),
    ("missing_frame", changed("seed", frames=1)),
    ("missing_frame", changed("published", frames=2)),
    ("extra_frame", lambda: [*plain(encode(SAMPLES["seed"], LIMITS)), b"more"]),
    ("extra_frame", lambda: [*plain(encode(SAMPLES["ack"], LIMITS)), b""]),
]


@pytest.mark.parametrize(
    ("code", "case"), CASES, ids=[f"{index}-{code}" for index, (code, _) in enumerate(CASES)]
)
def test_each_flaw_has_its_code(code: str, case: Case) -> None:
    frames = case()
    with pytest.raises(ProtocolError) as caught:
        decode(frames, LIMITS)
    assert caught.value.code == code
    assert len(str(caught.value)) < 500


def test_every_code_is_documented_and_has_a_case() -> None:
    raised: set[str] = set()
    for module in (codec, checks, fields):
        raised |= set(re.findall(r'ProtocolError\("(\w+)"', inspect.getsource(module)))
    table = (codec.__doc__ or "").split("|---|---|")[1]
    documented = set(re.findall(r"``(\w+)``", table)) - {"blocks"}
    assert raised == documented == {code for code, _ in CASES}


# --- hostile bytes -------------------------------------------------------------------------


def decoded_or_refused(frames: list[bytes]) -> None:
    """Anything but a message or a ProtocolError fails the test by being raised."""
    try:
        message = decode(frames, LIMITS)
    except ProtocolError:
        return
    assert same(decode(plain(encode(message, LIMITS)), LIMITS), message)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_mutated_frames_are_refused_or_valid(kind: str, data: st.DataObject) -> None:
    frames = [bytearray(frame) for frame in encode(data.draw(messages(kind)), LIMITS)]
    for _ in range(data.draw(st.integers(1, 3))):
        if not frames:
            break
        which = data.draw(st.integers(0, len(frames) - 1))
        frame = frames[which]
        place = data.draw(st.integers(0, max(len(frame) - 1, 0)))
        match data.draw(st.sampled_from(["cut", "flip", "set", "insert", "remove", "double"])):
            case "cut":
                del frame[place:]
            case "flip" if frame:
                frame[place] ^= 1 << data.draw(st.integers(0, 7))
            case "set" if frame:
                frame[place] = data.draw(st.integers(0, 255))
            case "insert":
                frame[place:place] = data.draw(st.binary(min_size=1, max_size=9))
            case "remove":
                del frames[which]
            case "double":
                frames.insert(which, bytearray(frame))
    decoded_or_refused([bytes(frame) for frame in frames])


@given(frames=st.lists(st.binary(max_size=200), max_size=3))
def test_random_bytes_are_refused(frames: list[bytes]) -> None:
    decoded_or_refused(frames)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=12,
)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_wrong_values_in_the_right_fields_are_refused_or_valid(
    kind: str, data: st.DataObject
) -> None:
    valid = plain(encode(SAMPLES[kind], LIMITS))
    header = msgpack.unpackb(valid[0])
    header[data.draw(st.sampled_from(sorted(header)))] = data.draw(values)
    decoded_or_refused([msgpack.packb(header), *valid[1:]])


@pytest.mark.parametrize(
    "frames",
    [
        tensor(shape=[2**61])(),
        [ARRAY_OF_4G * 1000],
        [b"\xdc\xff\xff" * 10_000],  # lists of 65,535 in lists of 65,535
        [b"\x91" * 99_999],
        [b"\xdf\xff\xff\xff\xff" + b"\xa1a" * 10],
        [b"\xc6" + struct.pack(">I", 2**32 - 1)],
        [b"\xdb" + struct.pack(">I", 2**32 - 1)],
    ],
    ids=["tensor", "lists", "nested-lists", "depth", "map", "bytes", "string"],
)
def test_what_is_declared_but_not_there_is_not_allocated(frames: list[bytes]) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode(frames, Limits())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000
