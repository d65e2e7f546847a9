"""The install log: what was installed when, the same on every rank, and how to replay it.

A run is determined by its data, its seeds and this log: which version each block had at each
step, and which statistics each version had folded.  `Replay` makes a later run follow it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from distcurv.errors import StateError


class Record(NamedTuple):
    """One install: at ``step`` block ``block`` switched to ``version``, which folded the
    statistics of training steps ``folded_from`` to ``folded_through``.

    Where several versions came between two polls only the newest is installed; those that it
    passed over are written before it with its step, because their statistics are in its factor."""

    step: int
    block: int
    version: int
    folded_from: int
    folded_through: int


class InstallLog:
    """All versions that a run folded, 40 bytes each.  ``installs`` counts those installed."""

    def __init__(self) -> None:
        self._numbers = array("q")
        self.installs = 0

    def append(self, record: Record) -> None:
        """Add one version; it is the installed one until another of its block and step comes."""
        width = len(Record._fields)
        before = self._numbers[-width:]
        self.installs += list(before[:2]) != list(record[:2])
        self._numbers.extend(record)

    def __len__(self) -> int:
        return len(self._numbers) // len(Record._fields)

    def records(self) -> list[Record]:
        """All installs in order."""
        width = len(Record._fields)
        numbers = self._numbers
        return [Record(*numbers[i : i + width]) for i in range(0, len(numbers), width)]

    def tensor(self) -> Tensor:
        """All installs as int64 [n, 5], a copy: for a state_dict, where a long run has millions."""
        return torch.tensor(self._numbers, dtype=torch.int64).view(-1, len(Record._fields))

    def replace(self, records: Iterable[Iterable[int]]) -> None:
        """Take over a log from a state_dict."""
        self._numbers = array("q")
        self.installs = 0
        for record in records:
            self.append(Record(*(int(n) for n in record)))

    def digest(self) -> str:
        """Hash of the log, to compare ranks."""
        return hashlib.sha256(self._numbers.tobytes()).hexdigest()


class Replay:
    """What a recorded log asks of a new run.

    Args:
        records: the install log of the run to follow.
        blocks: number of blocks of this run's table.
    """

    def __init__(self, records: Iterable[Iterable[int]], blocks: int) -> None:
        self._by_block: dict[int, list[Record]] = {}
        for item in records:
            record = Record(*(int(n) for n in item))
            if not 0 <= record.block < blocks:
                raise StateError(
                    f"the log to replay names block {record.block}, this run has {blocks}: "
                    "replay needs the same model and config"
                )
            self._by_block.setdefault(record.block, []).append(record)

    def window(self, blocks: Iterable[int], through: int) -> tuple[set[int], list[int]]:
        """Of a window that closed at ``through``: the blocks that send now, and those whose
        statistics were never folded and are dropped.  The others go on adding up."""
        send: set[int] = set()
        lost: list[int] = []
        for block in blocks:
            ends = [
                record.folded_through
                for record in self._by_block.get(block, [])
                if record.folded_from <= through <= record.folded_through
            ]
            if not ends:
                lost.append(block)
            elif through in ends:
                send.add(block)
        return send, lost

    def version_at(self, block: int, step: int) -> int | None:
        """The version that the block switches to at ``step``, if any."""
        versions = [r.version for r in self._by_block.get(block, []) if r.step == step]
        return max(versions, default=None)
