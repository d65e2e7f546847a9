"""The codec: what goes in comes out, uncopied, and encode refuses what decode would."""

from __future__ import annotations

import dataclasses
import typing
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from wire_messages import BLOCK, LIMITS, SAMPLES, messages, plain, same

from distcurv.errors import ProtocolError, ShapeError
from distcurv.wire import checks, codec
from distcurv.wire.checks import Limits
from distcurv.wire.codec import decode, encode
from distcurv.wire.fields import RULES, Payload
from distcurv.wire.messages import Message, Seed

KINDS = sorted(RULES)


# --- the table -----------------------------------------------------------------------------


def test_the_table_has_every_kind_and_every_field() -> None:
    assert {rule.make for rule in RULES.values()} == set(typing.get_args(Message))
    assert set(SAMPLES) == set(RULES)
    for kind, rule in RULES.items():
        assert list(rule.fields) == [field.name for field in dataclasses.fields(rule.make)], kind
        assert set(rule.beside) < set(rule.fields)
        lists = (checks.Ints, checks.Floats)
        numbers = {name for name, check in rule.fields.items() if isinstance(check, lists)}
        assert set(rule.beside) == numbers - {"blocks"}, f"{kind}: lists stand beside blocks"


# --- round trips ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_samples_round_trip(kind: str) -> None:
    frames = encode(SAMPLES[kind], LIMITS)
    assert same(decode(plain(frames), LIMITS), SAMPLES[kind])


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_any_message_round_trips(kind: str, data: st.DataObject) -> None:
    message = data.draw(messages(kind))
    frames = encode(message, LIMITS)
    assert same(decode(frames, LIMITS), message)
    assert same(decode(plain(frames), LIMITS), message)


def test_whole_numbers_become_floats() -> None:
    hello = dataclasses.replace(SAMPLES["hello"], blocks=[{**BLOCK, "decay": 0, "damping": 1}])
    back = decode(encode(hello, LIMITS), LIMITS)
    assert back.blocks[0]["decay"] == 0.0 and type(back.blocks[0]["decay"]) is float


def test_payloads_are_not_copied() -> None:
    payload = torch.arange(1000.0)
    frames = encode(Seed(b"s" * 16, [], [], [], payload), LIMITS)
    back = decode(frames, LIMITS).payload
    assert back.data_ptr() == payload.data_ptr()
    payload[3] = -1.0
    assert back[3] == -1.0


def test_the_frame_keeps_the_payload_alive() -> None:
    frames = encode(Seed(b"s" * 16, [], [], [], torch.arange(1000.0)), LIMITS)
    torch.full((1000,), 7.0)  # would take the freed memory
    assert torch.equal(decode(frames, LIMITS).payload, torch.arange(1000.0))


def test_read_only_frames_are_copied_without_a_warning() -> None:
    frames = plain(encode(SAMPLES["seed"], LIMITS))
    before = [bytes(bytearray(frame)) for frame in frames]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(frames, LIMITS).payload.zero_()
    assert frames == before


def test_misaligned_frames_are_copied() -> None:
    frames = encode(SAMPLES["seed"], LIMITS)
    shifted = memoryview(bytearray(b"x" + bytes(frames[1])))[1:]
    payload = decode([frames[0], shifted], LIMITS).payload
    assert payload.data_ptr() % 4 == 0
    assert torch.equal(payload, SAMPLES["seed"].payload)


@pytest.mark.parametrize("code", sorted(codec.DTYPES))
@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (7, 1)])
def test_every_dtype_travels_bit_for_bit(
    code: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = {**RULES["seed"].fields, "payload": Payload(codes=(code,), ndim=2)}
    monkeypatch.setitem(RULES, "seed", dataclasses.replace(RULES["seed"], fields=wide))
    payload = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(codec.DTYPES[code])
    back = decode(plain(encode(Seed(b"s" * 16, [], [], [], payload), LIMITS)), LIMITS).payload
    assert back.dtype == payload.dtype and back.shape == payload.shape
    assert torch.equal(back, payload)


# --- what encode refuses -------------------------------------------------------------------


def test_encode_refuses_what_decode_would() -> None:
    def refused(code: str, message: Message, limits: Limits = LIMITS) -> None:
        with pytest.raises(ProtocolError) as caught:
            encode(message, limits)
        assert caught.value.code == code

    seed = SAMPLES["seed"]
    refused("wrong_length", dataclasses.replace(seed, versions=[1]))
    refused("wrong_type", dataclasses.replace(seed, versions=[True, False]))
    refused("out_of_range", dataclasses.replace(seed, versions=[-1, 0]))
    refused("wrong_length", dataclasses.replace(seed, session=b"short"))
    refused("wrong_shape", dataclasses.replace(seed, payload=torch.zeros(2, 2)))
    refused("unknown_dtype", dataclasses.replace(seed, payload=torch.zeros(2, dtype=torch.int64)))
    refused("wrong_dtype", dataclasses.replace(seed, payload=torch.zeros(2, dtype=torch.bfloat16)))
    refused("too_large", seed, Limits(payload_bytes=19))
    refused("header_too_large", seed, Limits(header_bytes=10))
    refused("non_finite", dataclasses.replace(SAMPLES["heartbeat"], busy=float("nan")))


@pytest.mark.parametrize(
    "payload",
    [torch.arange(10.0)[::2], torch.empty(4, device="meta")],
    ids=["strided", "meta"],
)
def test_encode_refuses_tensors_that_it_would_have_to_copy(payload: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match=r"seed\.payload"):
        encode(dataclasses.replace(SAMPLES["seed"], payload=payload), LIMITS)
