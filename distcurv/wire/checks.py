"""What one value in a message may be: small checks that the table in ``fields`` is made of.

A check takes one value that came over a link (or is about to go) and returns it, or raises
`ProtocolError` with a stable code.  Nothing here allocates more than the value itself holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from distcurv.errors import ProtocolError

INT_MAX = 2**63 - 1


@dataclass(frozen=True)
class Limits:
    """How much one message may hold.

    Attributes:
        entries: the longest list, above all the number of blocks that one message speaks of.
        header_bytes: the largest frame 0, in bytes.
        payload_bytes: the largest tensor, in bytes.
    """

    entries: int = 65_536
    header_bytes: int = 8 * 2**20
    payload_bytes: int = 2**30

    @property
    def frame_bytes(self) -> int:
        """The largest frame of any sort, in bytes."""
        return max(self.header_bytes, self.payload_bytes)


class Check(Protocol):
    """One field's rule.  ``where`` names the field in the error text."""

    def __call__(self, where: str, value: object, limits: Limits) -> object: ...


@dataclass(frozen=True)
class Int:
    """A whole number (never a bool) from ``low`` to 2**63 - 1."""

    low: int = 0

    def __call__(self, where: str, value: object, limits: Limits) -> int:
        if type(value) is not int:
            raise ProtocolError("wrong_type", f"{where} is a {_type(value)}, not an int")
        if not self.low <= value <= INT_MAX:
            raise ProtocolError("out_of_range", f"{where} is {value}, below {self.low} or too big")
        return value


@dataclass(frozen=True)
class Float:
    """A finite number; whole numbers are taken as floats."""

    low: float = -math.inf

    def __call__(self, where: str, value: object, limits: Limits) -> float:
        return _floats(where, [value], self.low)[0]


@dataclass(frozen=True)
class Bool:
    """True or False."""

    def __call__(self, where: str, value: object, limits: Limits) -> bool:
        if type(value) is not bool:
            raise ProtocolError("wrong_type", f"{where} is a {_type(value)}, not a bool")
        return value


@dataclass(frozen=True)
class Text:
    """A string of at most ``most`` characters, one of ``words`` where those are given."""

    most: int = 64
    words: tuple[str, ...] = ()

    def __call__(self, where: str, value: object, limits: Limits) -> str:
        if type(value) is not str:
            raise ProtocolError("wrong_type", f"{where} is a {_type(value)}, not a string")
        if len(value) > self.most:
            text = f"{where} has {len(value)} characters, at most {self.most} are allowed"
            raise ProtocolError("wrong_length", text)
        if self.words and value not in self.words:
            raise ProtocolError("out_of_range", f"{where} is {value!r}, not one of {self.words}")
        return value


@dataclass(frozen=True)
class Bytes:
    """A byte string of one of the given lengths."""

    lengths: tuple[int, ...]

    def __call__(self, where: str, value: object, limits: Limits) -> bytes:
        if type(value) is not bytes:
            raise ProtocolError("wrong_type", f"{where} is a {_type(value)}, not bytes")
        if len(value) not in self.lengths:
            text = f"{where} has {len(value)} bytes, not one of {self.lengths}"
            raise ProtocolError("wrong_length", text)
        return value


@dataclass(frozen=True)
class Ints:
    """A list of whole numbers, each at least ``low``; checked without a Python loop."""

    low: int = 0

    def __call__(self, where: str, value: object, limits: Limits) -> list[int]:
        values = _list(where, value, limits.entries)
        if not set(map(type, values)) <= {int}:
            raise ProtocolError("wrong_type", f"{where} holds something that is not an int")
        numbers: list[int] = values
        if numbers and not (self.low <= min(numbers) and max(numbers) <= INT_MAX):
            text = f"{where} holds a number below {self.low} or above {INT_MAX}"
            raise ProtocolError("out_of_range", text)
        return numbers


@dataclass(frozen=True)
class Floats:
    """A list of finite numbers."""

    def __call__(self, where: str, value: object, limits: Limits) -> list[float]:
        return _floats(where, _list(where, value, limits.entries), -math.inf)


@dataclass(frozen=True)
class Maps:
    """A list of at most ``most`` maps (or the limit's), each with exactly these fields."""

    fields: Mapping[str, Check]
    most: int | None = None

    def __call__(self, where: str, value: object, limits: Limits) -> list[dict[str, object]]:
        most = limits.entries if self.most is None else self.most
        out: list[dict[str, object]] = []
        for index, entry in enumerate(_list(where, value, most)):
            name = f"{where}[{index}]"
            if type(entry) is not dict:
                raise ProtocolError("wrong_type", f"{name} is a {_type(entry)}, not a map")
            require_fields(name, entry, self.fields)
            checks = self.fields.items()
            out.append({key: check(f"{name}.{key}", entry[key], limits) for key, check in checks})
        return out


def require_fields(where: str, entry: Mapping[str, object], fields: Mapping[str, object]) -> None:
    """Raise unless ``entry`` has exactly the keys of ``fields``."""
    missing = sorted(fields.keys() - entry.keys())
    if missing:
        raise ProtocolError("missing_field", f"{where} lacks {', '.join(missing)}")
    if len(entry) > len(fields):
        unknown = ascii(next(key for key in entry if key not in fields))
        text = f"{where} has {len(entry) - len(fields)} unknown fields, one is {unknown:.80}"
        raise ProtocolError("unknown_field", text)


def _type(value: object) -> str:
    return type(value).__name__


def _list(where: str, value: object, most: int) -> list[Any]:
    if type(value) is not list:
        raise ProtocolError("wrong_type", f"{where} is a {_type(value)}, not a list")
    if len(value) > most:
        raise ProtocolError("too_many", f"{where} has {len(value)} entries, at most {most}")
    return value


def _floats(where: str, values: list[object], low: float) -> list[float]:
    if not set(map(type, values)) <= {float, int}:
        raise ProtocolError("wrong_type", f"{where} holds something that is not a number")
    numbers: list[float] = values  # type: ignore[assignment]  # just checked
    if not all(map(math.isfinite, numbers)):
        raise ProtocolError("non_finite", f"{where} holds an infinite or undefined number")
    if numbers and min(numbers) < low:
        raise ProtocolError("out_of_range", f"{where} is below {low}")
    return list(map(float, numbers))
