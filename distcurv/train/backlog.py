"""The backlog: an owner's statistics that wait to be sent, bounded per block.

While a statistic of a block is in flight, later windows add up here: one sum per basis, two bases
at most.  What is older is dropped, and counted and logged as dropped.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from distcurv.train.depot import Depot
from distcurv.train.table import BlockTable

_MAX_BASES = 2


class Span(NamedTuple):
    """Which training steps a statistic covers, and how many of them were statistic steps."""

    since: int
    through: int
    captures: int


@dataclass
class Pending:
    """A block's statistics against one basis."""

    basis: int
    span: Span
    flat: Tensor = field(repr=False)


class Backlog:
    """What waits, by block.

    Args:
        table: the block table.
        blocks: the owner's blocks in table order.
        depot: where drops are counted.
    """

    def __init__(self, table: BlockTable, blocks: list[int], depot: Depot) -> None:
        self._blocks = blocks
        self._depot = depot
        self._sizes = [table.statistic_layouts[block].size for block in blocks]
        self._queues: dict[int, list[Pending]] = {block: [] for block in blocks}

    def steps(self) -> int:
        """(block, statistic step) that wait."""
        return sum(p.span.captures for queue in self._queues.values() for p in queue)

    def oldest_basis(self, block: int, current: int) -> int:
        """The oldest basis version against which a statistic may still be sent."""
        return min([current] + [pending.basis for pending in self._queues[block]])

    def add(self, span: Span, bucket: Tensor, basis: list[int]) -> None:
        """Add a closed and reduced window.

        Args:
            bucket: statistic layouts of the owner's blocks in table order, float32; kept.
            basis: version of the window's basis, by block of the table.
        """
        if span.captures == 0:
            return
        for block, flat in zip(self._blocks, bucket.split(self._sizes), strict=True):
            queue = self._queues[block]
            if queue and queue[-1].basis == basis[block]:
                last = queue[-1]
                last.flat.add_(flat)
                last.span = Span(last.span.since, span.through, last.span.captures + span.captures)
                continue
            queue.append(Pending(basis[block], span, flat))
            if len(queue) > _MAX_BASES:
                old = queue.pop(0)
                self._depot.drop([block], old.span.captures, "statistics against an old basis")

    def sendable(self, blocks: Iterable[int]) -> dict[Span, list[int]]:
        """Blocks with something to send and nothing in flight, by the span of what is next."""
        groups: dict[Span, list[int]] = {}
        for block in blocks:
            queue = self._queues[block]
            if queue and self._depot.in_flight(block) is None:
                groups.setdefault(queue[0].span, []).append(block)
        return groups

    def first(self, blocks: list[int]) -> tuple[list[int], Tensor]:
        """Basis versions and concatenated payload of the oldest entry of each block."""
        entries = [self._queues[block][0] for block in blocks]
        return [e.basis for e in entries], torch.cat([e.flat for e in entries])

    def sent(self, blocks: list[int]) -> None:
        """Forget the oldest entry of each block."""
        for block in blocks:
            self._queues[block].pop(0)

    def compact(self) -> None:
        """What stays must not keep the whole bucket of its window alive."""
        for queue in self._queues.values():
            for pending in queue:
                if pending.flat.untyped_storage().nbytes() > 4 * pending.flat.numel():
                    pending.flat = pending.flat.clone()

    def discard(self, blocks: Iterable[int], reason: str) -> None:
        """Drop everything that waits for these blocks."""
        for block in blocks:
            captures = sum(pending.span.captures for pending in self._queues[block])
            self._depot.drop([block], captures, reason)
            self._queues[block] = []
