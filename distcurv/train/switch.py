"""The switch: how all ranks come to install the same versions at the same step.

Three collectives, each begun in one step and finished in a later one: a poll of what is resident
at the owners, broadcasts of what the poll announced, and then the install.  Every decision is
made from the reduced poll, so it is the same on all ranks; an owner keeps what it announced
pinned until it is broadcast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distcurv.curvature.spec import Tensors
from distcurv.train.depot import State
from distcurv.train.group import Poll, RankGroup, Spread
from distcurv.train.table import BlockTable


@dataclass(frozen=True)
class Install:
    """A block's installed version.

    ``tensors`` are views of ``flat`` by name, on the training device.  ``since`` and ``through``
    are the training steps that it folded; ``route`` says where it was made (``worker | inline``,
    ``start`` for version 0, the random start, or ``state_dict``)."""

    block: int
    version: int
    since: int
    through: int
    step: int
    route: str
    flat: Tensor = field(repr=False)
    tensors: Tensors = field(repr=False)


class Switch:
    """Poll, announce, install.  Belongs to the training thread."""

    def __init__(self, group: RankGroup, table: BlockTable) -> None:
        self._group = group
        self._table = table
        self._poll: Poll | None = None
        self._pinned: dict[int, State] = {}
        self._spread: Spread | None = None

    def begin_poll(
        self, step: int, fingerprint: int, resident: Callable[[int], State | None]
    ) -> None:
        """Begin to tell all ranks the newest version of each block.

        Args:
            step, fingerprint: compared over the ranks.
            resident: the state to announce of a block of this owner, or None.
        """
        versions = [-1] * len(self._table)
        self._pinned = {}
        for block in self._table.owned_by(self._group.rank):
            state = resident(block)
            if state is not None:
                self._pinned[block] = state
                versions[block] = state.version
        self._poll = self._group.begin_poll(step, self._table.digest_number, fingerprint, versions)

    def announce(self, installed: list[Install]) -> None:
        """Finish the poll and begin to broadcast what is newer than ``installed``.

        Raises `MismatchError` on all ranks when they disagree."""
        if self._poll is None:
            return
        poll, self._poll = self._poll, None
        blocks: dict[int, list[int]] = {}
        for block, version in enumerate(self._group.finish_poll(poll)):
            if version > installed[block].version:
                blocks.setdefault(self._table.owners[block], []).append(block)
        sizes = {
            owner: sum(self._table.published_layouts[b].size for b in mine)
            for owner, mine in blocks.items()
        }
        headers: dict[int, Tensor] = {}
        buckets: dict[int, Tensor] = {}
        rank = self._group.rank
        if rank in blocks:
            states = [self._pinned[block] for block in blocks[rank]]
            headers[rank] = torch.tensor(
                [[s.version, s.since, s.through, int(s.route == "worker")] for s in states]
            )
            buckets[rank] = torch.cat([s.flat for s in states]).to(self._group.device)
        self._pinned = {}
        self._spread = self._group.begin_broadcast(blocks, sizes, headers, buckets)

    def finish(self, step: int) -> list[Install]:
        """Finish the broadcasts; what all ranks install at ``step``, in the same order."""
        if self._spread is None:
            return []
        spread, self._spread = self._spread, None
        self._group.finish(spread.works)
        installs: list[Install] = []
        for owner, blocks in sorted(spread.blocks.items()):
            sizes = [self._table.published_layouts[b].size for b in blocks]
            parts = spread.buckets[owner].split(sizes)
            heads = spread.headers[owner].tolist()
            for block, part, head in zip(blocks, parts, heads, strict=True):
                version, since, through, worker = head
                route = "worker" if worker else "inline"
                tensors = self._table.published_layouts[block].views(part)
                installs.append(Install(block, version, since, through, step, route, part, tensors))
        return installs

    def abandon(self) -> None:
        """Complete what is under way and discard it (all ranks do so at the same step)."""
        if self._poll is not None:
            self._group.finish_poll(self._poll)
            self._poll = None
        if self._spread is not None:
            self._group.finish(self._spread.works)
            self._spread = None
        self._pinned = {}
