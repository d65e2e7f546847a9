"""What is covered, as rows of data and as a plain table: what ``summary()`` returns.

Knows no models and no ranks; `distcurv.train.coverage` makes the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

COLUMNS = (
    "parameter",
    "shape",
    "block",
    "kind",
    "dims",
    "rank",
    "encoding",
    "per refresh",
    "owner",
    "worker",
    "why not covered",
)
NUMBERS = frozenset({"per refresh", "owner"})  # columns that are set to the right


class Side(NamedTuple):
    """One side of a block: ``A``, ``G`` or, of a block with one side, ``F``."""

    name: str
    dim: int
    rank: int
    encoding: str


@dataclass(frozen=True)
class BlockRow:
    """What is said of a block.

    Attributes:
        name: of the block.
        kind: key of its kind.
        sides: in order.
        bytes_per_refresh: its statistic and its preconditioner, as they travel.
        owner: the training rank that talks to workers about it.
        worker: the endpoint that serves it after the early phase, ``inline`` for the owner's
            process; None where that is not known.
    """

    name: str
    kind: str
    sides: tuple[Side, ...]
    bytes_per_refresh: int
    owner: int
    worker: str | None


@dataclass(frozen=True)
class Row:
    """One parameter in one block; or a parameter (or rows of one) that is in none.

    Attributes:
        parameter: full name in the bare model.
        rows: the part of it that this row is about, (start, stop) of dimension 0; None: all.
        shape: of that part.
        numbers: entries of that part.
        trainable: whether it is trained at all.
        block: where it is covered, None where it is not.
        reason: why it is not covered, None where it is.
    """

    parameter: str
    rows: tuple[int, int] | None
    shape: tuple[int, ...]
    numbers: int
    trainable: bool
    block: BlockRow | None
    reason: str | None


@dataclass(frozen=True)
class Summary:
    """Which parameters are preconditioned and how.  ``str()`` of it is a table.

    Attributes:
        rows: in the model's order; a tied parameter appears once, under its first name.
    """

    rows: tuple[Row, ...]

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len({row.block.name for row in self.rows if row.block is not None})

    @property
    def trainable(self) -> int:
        """Trainable parameters, counted in numbers."""
        return sum(row.numbers for row in self.rows if row.trainable)

    @property
    def covered(self) -> int:
        """How many of those are in a block."""
        return sum(row.numbers for row in self.rows if row.block is not None)

    @property
    def coverage(self) -> float:
        """Their share, from 0 to 1; 0 where nothing is trainable."""
        return self.covered / self.trainable if self.trainable else 0.0

    @property
    def bytes_per_refresh(self) -> int:
        """Bytes of one refresh of all blocks."""
        sizes = {r.block.name: r.block.bytes_per_refresh for r in self.rows if r.block is not None}
        return sum(sizes.values())

    @property
    def total(self) -> str:
        """The last line: what is covered all in all."""
        return (
            f"{self.covered:,} of {self.trainable:,} trainable parameters covered "
            f"({self.coverage:.1%}) by {self.blocks} blocks, "
            f"{bytes_text(self.bytes_per_refresh)} per refresh of all"
        )

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Titles and texts of the table, without the columns that say nothing.

        What is said of a block stands in the first of its rows."""
        lines, said = [], set()
        for row in self.rows:
            first = row.block is None or row.block.name not in said
            if row.block is not None:
                said.add(row.block.name)
            lines.append(_cells(row, first))
        kept = [i for i in range(len(COLUMNS)) if i == 0 or any(line[i] for line in lines)]
        return [COLUMNS[i] for i in kept], [[line[i] for i in kept] for line in lines]

    def __str__(self) -> str:
        titles, lines = self.cells()
        return "\n".join([*plain_lines(titles, lines, NUMBERS), "", self.total])

    def as_fields(self) -> dict[str, object]:
        """Plain maps and lists, for JSON."""
        return {
            "rows": [_fields(row) for row in self.rows],
            "blocks": self.blocks,
            "trainable": self.trainable,
            "covered": self.covered,
            "coverage": self.coverage,
            "bytes_per_refresh": self.bytes_per_refresh,
        }


def bytes_text(count: float) -> str:
    """E.g. "1.5 MB"; decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def plain_lines(
    titles: Sequence[str], lines: Sequence[Sequence[str]], right: frozenset[str]
) -> list[str]:
    """A table in plain columns, two spaces apart; columns titled in ``right`` to the right."""
    widths = [max(map(len, column)) for column in zip(titles, *lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if title in right else cell.ljust(width)
            for title, cell, width in zip(titles, cells, widths, strict=True)
        )
        return "  ".join(padded).rstrip()

    return [line(titles), line(["-" * width for width in widths]), *map(line, lines)]


def _cells(row: Row, first: bool) -> list[str]:
    """The texts of one row, by `COLUMNS`; ``first`` of the rows of its block."""
    part = "" if row.rows is None else f"[{row.rows[0]}:{row.rows[1]}]"
    own = [row.parameter + part, "x".join(map(str, row.shape)) or "scalar"]
    block = row.block
    if block is None:
        return [*own, *[""] * (len(COLUMNS) - 3), row.reason or ""]
    if not first:
        return [*own, block.name, *[""] * (len(COLUMNS) - 3)]
    with_rank = any(side.rank for side in block.sides)
    return [
        *own,
        block.name,
        block.kind,
        " x ".join(str(side.dim) for side in block.sides),
        ", ".join(str(side.rank or "-") for side in block.sides) if with_rank else "",
        ", ".join(side.encoding for side in block.sides),
        bytes_text(block.bytes_per_refresh),
        str(block.owner),
        block.worker or "",
        "",
    ]


def _fields(row: Row) -> dict[str, object]:
    fields: dict[str, object] = {
        "parameter": row.parameter,
        "rows": list(row.rows) if row.rows is not None else None,
        "shape": list(row.shape),
        "numbers": row.numbers,
        "trainable": row.trainable,
        "reason": row.reason,
        "block": None,
    }
    if row.block is not None:
        block = row.block
        fields |= {
            "block": block.name,
            "kind": block.kind,
            "sides": [side._asdict() for side in block.sides],
            "bytes_per_refresh": block.bytes_per_refresh,
            "owner": block.owner,
            "worker": block.worker,
        }
    return fields
