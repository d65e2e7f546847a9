"""Messages to frames and back, so that nothing is believed that the table does not allow.

Frame 0 is a msgpack map ``{"kind": ..., field: ...}``; a tensor stands there as
``[dtype code, shape, frame index]`` and its raw bytes are that frame, neither copied on the
way out nor on the way in.  Every flaw is a `ProtocolError` with one of these codes:

| code | what is wrong |
|---|---|
| ``no_frames`` | not even frame 0 |
| ``header_too_large`` | frame 0 is longer than the limit |
| ``truncated``, ``trailing_bytes`` | frame 0 ends too early, or goes on after the map |
| ``malformed``, ``too_deep`` | frame 0 is no msgpack map, or nests like a bomb |
| ``duplicate_field``, ``missing_field``, ``unknown_field`` | not exactly the fields of the kind |
| ``unknown_kind`` | no such kind of message |
| ``wrong_protocol`` | a Hello of another protocol version |
| ``wrong_type``, ``out_of_range``, ``non_finite`` | a value is not what the field holds |
| ``wrong_length`` | bytes, a string or a list beside ``blocks`` has another length |
| ``too_many`` | a list is longer than the limit |
| ``unknown_dtype``, ``wrong_dtype`` | no such dtype code, or not one for this field |
| ``wrong_shape``, ``wrong_nbytes`` | a shape that cannot be, or does not fit its frame |
| ``too_large`` | a tensor holds more bytes than the limit |
| ``missing_frame``, ``extra_frame`` | a tensor without its frame, a frame without its tensor |
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import msgpack
import torch
from torch import Tensor

from distcurv.errors import ProtocolError, ShapeError
from distcurv.wire.checks import INT_MAX, Limits, require_fields
from distcurv.wire.fields import RULES, Payload, Rule
from distcurv.wire.messages import PROTOCOL, Message

Buffer = bytes | bytearray | memoryview

DTYPES: dict[str, torch.dtype] = {
    "f4": torch.float32,
    "bf16": torch.bfloat16,
    "f2": torch.float16,
    "f8": torch.float64,
}

# Raw bytes are in the sender's order: a code carries it, so that the other order is refused.
_ORDER = "<" if sys.byteorder == "little" else ">"
_DTYPES = {_ORDER + code: dtype for code, dtype in DTYPES.items()}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_KIND_OF = {rule.make: kind for kind, rule in RULES.items()}


def encode(message: Message, limits: Limits) -> list[Buffer]:
    """Frames of a message.  Tensors are not copied: they must not be written to afterwards.

    Raises:
        ProtocolError: a field is not what the table says (the same codes as in `decode`).
        ShapeError: a tensor is not contiguous or not on the CPU.
    """
    kind = _KIND_OF[type(message)]
    rule = RULES[kind]
    values: dict[str, Any] = {"kind": kind}
    frames: list[Buffer] = [b""]
    for name, check in rule.fields.items():
        value = vars(message)[name]
        where = f"{kind}.{name}"
        if isinstance(check, Payload):
            frames.append(tensor_bytes(where, value))
            code = _CODES.get(value.dtype, str(value.dtype))
            descriptor: list[object] = [code, list(value.shape), len(frames) - 1]
            _tensor_plan(where, descriptor, check, frames, limits)
            values[name] = descriptor
        else:
            values[name] = check(where, value, limits)
    _check_together(kind, rule, values)
    header = msgpack.packb(values)
    if len(header) > limits.header_bytes:
        raise ProtocolError("header_too_large", f"{kind} needs a header of {len(header)} bytes")
    frames[0] = header
    return frames


def decode(frames: Sequence[Buffer], limits: Limits) -> Message:
    """The message in these frames; its tensors are views of the frames' memory.

    A frame that is read-only or misaligned for its dtype is copied (links give neither for a
    large tensor).

    Raises:
        ProtocolError: with a code of the table at the top of this file, and nothing else.
    """
    if not frames:
        raise ProtocolError("no_frames", "a message without frames")
    values = _unpack(frames[0], limits)
    kind = values.pop("kind", None)
    if type(kind) is not str or kind not in RULES:
        raise ProtocolError("unknown_kind", f"{kind!a:.80} is no kind of message")
    rule = RULES[kind]
    if "protocol" in rule.fields and values.get("protocol") != PROTOCOL:
        theirs = values.get("protocol")
        text = f"the peer speaks protocol {theirs!a:.40}, this side {PROTOCOL}: use one release"
        raise ProtocolError("wrong_protocol", text)
    require_fields(kind, values, rule.fields)
    used: set[int] = set()
    for name, check in rule.fields.items():
        where = f"{kind}.{name}"
        if isinstance(check, Payload):
            dtype, shape, index = _tensor_plan(where, values[name], check, frames, limits)
            used.add(index)
            values[name] = _tensor(frames[index], dtype, shape)
        else:
            values[name] = check(where, values[name], limits)
    _check_together(kind, rule, values)
    if used != set(range(1, len(frames))):
        text = f"{kind} came with {len(frames)} frames and speaks of {len(used) + 1}"
        raise ProtocolError("extra_frame", text)
    return rule.make(**values)


def _unpack(header: Buffer, limits: Limits) -> dict[str, Any]:
    size = len(header)
    if size > limits.header_bytes:
        text = f"a header of {size} bytes, at most {limits.header_bytes} are allowed"
        raise ProtocolError("header_too_large", text)
    try:
        # Walking over the bytes first builds nothing, so a few bytes that declare huge or
        # deeply nested lists cost nothing: what survives is all there.
        walker = msgpack.Unpacker(max_buffer_size=max(size, 1))
        walker.feed(header)
        walker.skip()
        if walker.tell() != size:
            text = f"{size - walker.tell()} bytes after the message in frame 0"
            raise ProtocolError("trailing_bytes", text)
        values = msgpack.unpackb(
            header,
            object_pairs_hook=_map,
            max_ext_len=0,
        )
    except (msgpack.StackError, RecursionError) as error:
        raise ProtocolError("too_deep", "frame 0 nests too deeply") from error
    except msgpack.OutOfData as error:
        raise ProtocolError("truncated", f"frame 0 ends after {size} bytes") from error
    except (msgpack.UnpackException, ValueError) as error:
        raise ProtocolError("malformed", f"frame 0 is no message: {error!s:.200}") from error
    if type(values) is not dict:
        raise ProtocolError("malformed", f"frame 0 is a {type(values).__name__}, not a map")
    return values


def _map(pairs: list[tuple[object, object]]) -> dict[object, object]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ProtocolError("duplicate_field", "a map in frame 0 has a field twice")
    return out


def _check_together(kind: str, rule: Rule, values: dict[str, Any]) -> None:
    """What no field can tell alone."""
    for name in rule.beside:
        entries, blocks = len(values[name]), len(values["blocks"])
        if entries != blocks:
            text = f"{kind}.{name} has {entries} entries beside {blocks} blocks"
            raise ProtocolError("wrong_length", text)


def _tensor_plan(
    where: str, value: object, check: Payload, frames: Sequence[Buffer], limits: Limits
) -> tuple[torch.dtype, list[int], int]:
    """Dtype, shape and frame of a tensor, believed only when the frame holds just that."""
    if type(value) is not list or len(value) != 3:
        raise ProtocolError("wrong_type", f"{where} is not [dtype code, shape, frame]")
    code, shape, index = value
    if type(code) is not str or type(index) is not int or type(shape) is not list:
        raise ProtocolError("wrong_type", f"{where} is not [dtype code, shape, frame]")
    if code not in _DTYPES:
        raise ProtocolError("unknown_dtype", f"{where} has the dtype code {code!a:.40}")
    if code.removeprefix(_ORDER) not in check.codes:
        raise ProtocolError("wrong_dtype", f"{where} has dtype {code}, not one of {check.codes}")
    if len(shape) != check.ndim or not set(map(type, shape)) <= {int}:
        text = f"{where} has a shape of {len(shape)} entries: {check.ndim} whole numbers are due"
        raise ProtocolError("wrong_shape", text)
    if not all(0 <= size <= INT_MAX for size in shape):
        raise ProtocolError("wrong_shape", f"{where} has the shape {shape}")
    nbytes = math.prod(shape) * _DTYPES[code].itemsize
    if nbytes > limits.payload_bytes:
        text = f"{where} has {nbytes} bytes, at most {limits.payload_bytes} are allowed"
        raise ProtocolError("too_large", text)
    if not 1 <= index < len(frames):
        text = f"{where} is in frame {index}, but there are {len(frames)} frames"
        raise ProtocolError("missing_frame", text)
    if len(frames[index]) != nbytes:
        text = f"{where} of shape {shape} needs {nbytes} bytes, its frame has {len(frames[index])}"
        raise ProtocolError("wrong_nbytes", text)
    return _DTYPES[code], shape, index


def tensor_bytes(where: str, tensor: Tensor) -> memoryview:
    """The bytes of a tensor, as a view of its storage (which the view keeps alive).

    Raises ShapeError when the tensor is not contiguous or not on the CPU."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ShapeError(
            f"{where} is a tensor of shape {tuple(tensor.shape)} on {tensor.device}, "
            f"contiguous: {tensor.is_contiguous()}; hand over a contiguous one on the CPU"
        )
    # As bytes, because numpy knows no bfloat16.
    view: memoryview = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
    return view


def _tensor(frame: Buffer, dtype: torch.dtype, shape: list[int]) -> Tensor:
    if not len(frame):
        return torch.empty(shape, dtype=dtype)
    writable = bytearray(frame) if memoryview(frame).readonly else frame
    flat = torch.frombuffer(writable, dtype=dtype)
    if flat.data_ptr() % dtype.itemsize:
        flat = flat.clone()
    return flat.view(shape)
