"""Reads the block table of a `Hello`: nothing that a peer claims is believed or allocated before.

The codec has checked that the entries are plain maps; here they become `BlockSpec`s of known
kinds, and the memory that they will need is counted before a byte of it is reserved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from distcurv.curvature.kinds import KINDS
from distcurv.curvature.spec import BlockSpec, SideSpec
from distcurv.errors import ProtocolError, ShapeError
from distcurv.worker.settings import MESSAGE_BYTES, WorkerSettings
from distcurv.worker.store import FLOAT_BYTES

LARGEST_DIM = 2**24  # keeps every size far inside 64 bits

_BLOCK_FIELDS = {
    *("name", "kind", "sides", "decay", "damping", "relative_damping", "power"),
    *("max_itr", "tolerance", "wire_dtype"),
}
_SIDE_FIELDS = {"dim", "rank", "tail", "encoding", "units"}


def read_table(entries: Sequence[Mapping[str, object]], room: int) -> list[BlockSpec]:
    """The specs of a session's blocks.

    ``room`` is how many blocks may still be taken.  Raises `ProtocolError` with code
    ``too_large``, ``unknown_kind`` or ``bad_table``."""
    if len(entries) > room:
        raise ProtocolError("too_large", f"{len(entries)} blocks: this worker has room for {room}")
    specs = [_read_block(entry, index) for index, entry in enumerate(entries)]
    if len({spec.name for spec in specs}) != len(specs):
        raise ProtocolError("bad_table", "two blocks of the table have the same name")
    return specs


def claimed_bytes(specs: Sequence[BlockSpec], settings: WorkerSettings) -> int:
    """Worst case of what the blocks keep: every basis, one state, a full queue of statistics, and
    what is sent where it is not the newest basis itself.

    Raises `ProtocolError`: ``bad_table`` where a kind has no layout for a block, ``too_large``
    where a block would not fit into a message."""
    total = 0
    for spec in specs:
        kind = KINDS[spec.kind]
        try:
            layout = kind.published_layout(spec)
            published = layout.size * FLOAT_BYTES
            statistic = kind.statistic_layout(spec).size * FLOAT_BYTES
        except ShapeError as error:
            raise ProtocolError("bad_table", f"block {spec.name}: {error}") from error
        if max(published, statistic) > MESSAGE_BYTES:
            raise ProtocolError(
                "too_large",
                f"block {spec.name} needs messages of {max(published, statistic)} bytes, at most "
                f"{MESSAGE_BYTES} can be sent: lower its rank or leave it out",
            )
        total += (settings.max_bases + 1) * published + (settings.max_queued + 1) * statistic
        total += layout.nbytes if layout.narrow else 0
    return total


def _read_block(entry: Mapping[str, object], index: int) -> BlockSpec:
    where = f"block {index} of the table"
    if set(entry) != _BLOCK_FIELDS:
        raise ProtocolError("bad_table", f"{where} has fields {sorted(entry)}")
    kind = _text(entry["kind"], f"{where}: kind")
    if kind not in KINDS:
        raise ProtocolError("unknown_kind", f"{where} is of kind {kind!r}; known: {sorted(KINDS)}")
    sides = entry["sides"]
    if not isinstance(sides, list):
        raise ProtocolError("bad_table", f"{where}: sides is a {type(sides).__name__}, not a list")
    decay = _number(entry["decay"], f"{where}: decay")
    relative = entry["relative_damping"]
    if not isinstance(relative, bool):
        raise ProtocolError("bad_table", f"{where}: relative_damping is {relative!r}")
    name = _text(entry["name"], f"{where}: name")
    damping = _number(entry["damping"], f"{where}: damping")
    power = _number(entry["power"], f"{where}: power")
    max_itr = _whole(entry["max_itr"], f"{where}: max_itr")
    tolerance = _number(entry["tolerance"], f"{where}: tolerance")
    wire_dtype = _text(entry["wire_dtype"], f"{where}: wire_dtype")
    sides_read = tuple(_read_side(side, where) for side in sides)
    try:
        return BlockSpec(
            name,
            kind,
            sides_read,
            decay,
            damping,
            relative,
            power,
            max_itr,
            tolerance,
            wire_dtype,
        )
    except ShapeError as error:
        raise ProtocolError("bad_table", f"{where}: {error}") from error


def _read_side(entry: object, where: str) -> SideSpec:
    if not isinstance(entry, Mapping) or set(entry) != _SIDE_FIELDS:
        raise ProtocolError("bad_table", f"{where}: a side needs the fields {sorted(_SIDE_FIELDS)}")
    try:
        return SideSpec(
            dim=_whole(entry["dim"], f"{where}: dim"),
            rank=_whole(entry["rank"], f"{where}: rank"),
            tail=_text(entry["tail"], f"{where}: tail"),
            encoding=_text(entry["encoding"], f"{where}: encoding"),
            units=_whole(entry["units"], f"{where}: units"),
        )
    except ShapeError as error:
        raise ProtocolError("bad_table", f"{where}: {error}") from error


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ProtocolError("bad_table", f"{where} is {value!r}, not a string")
    return value


def _whole(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ProtocolError("bad_table", f"{where} is {value!r}, not a whole number")
    if value > LARGEST_DIM:
        raise ProtocolError("too_large", f"{where} is {value}, at most {LARGEST_DIM} can be")
    return value


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ProtocolError("bad_table", f"{where} is {value!r}, not a number")
    if not (math.isfinite(value) and value >= 0):
        raise ProtocolError("bad_table", f"{where} is {value}, it must be finite and 0 or more")
    return float(value)
