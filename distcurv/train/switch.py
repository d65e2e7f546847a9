"""The switch: how all ranks come to install the same versions at the same step.

Three collectives, each begun in one step and finished in a later one: a poll of what is resident
at the owners, broadcasts of what the poll announced, and then the install.  Every decision is
made from the reduced poll, so it is the same on all ranks; an owner keeps what it announced
pinned until it is broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distcurv.curvature.kinds import KINDS
from distcurv.curvature.spec import Tensors
from distcurv.errors import StateError
from distcurv.train.depot import Depot, State
from distcurv.train.group import Poll, Prints, RankGroup, Spread
from distcurv.train.table import BlockTable

# Stands in a poll for a version that was due and will not come; larger than any other number.
LOST = 2**62
# In a bucket every block begins where memory of its own would: how products round may depend on
# that, and a resumed run, whose blocks lie apart, should give the same bits.
ALIGNED = 128  # numbers


@dataclass(frozen=True)
class Install:
    """A block's installed version.

    ``tensors`` are views of ``flat`` by name, on the training device.  ``since`` and ``through``
    are the training steps that it folded; ``route`` says where it was made (``worker | inline``,
    ``start`` for version 0, the random start, or ``state_dict``).  ``passed`` are (version, since,
    through) of the versions between the one before and this one: folded, but never installed."""

    block: int
    version: int
    since: int
    through: int
    step: int
    route: str
    flat: Tensor = field(repr=False)
    tensors: Tensors = field(repr=False)
    passed: tuple[tuple[int, int, int], ...] = ()


def first_installs(table: BlockTable, seed: int, device: torch.device) -> list[Install]:
    """Version 0 of every block, from the seed alone and therefore the same on all ranks."""
    installs = []
    for block, (spec, layout) in enumerate(zip(table.specs, table.published_layouts, strict=True)):
        flat = layout.pack(KINDS[spec.kind].start(spec, seed)).to(device)
        installs.append(Install(block, 0, -1, -1, 0, "start", flat, layout.views(flat)))
    return installs


class Switch:
    """Poll, announce, install.  Belongs to the training thread.

    Args:
        group, table: of the job.
        depot: where the versions of this rank's blocks are kept.
    """

    def __init__(self, group: RankGroup, table: BlockTable, depot: Depot) -> None:
        self._group = group
        self._table = table
        self._depot = depot
        self._poll: Poll | None = None
        self._pinned: dict[int, list[State]] = {}
        self._rows: dict[int, int] = {}  # of a block in its owner's header
        self._spread: Spread | None = None

    def begin_poll(
        self, step: int, prints: Prints, resident: Callable[[int], list[State] | None]
    ) -> None:
        """Begin to tell all ranks the newest version of each block.

        Args:
            step, prints: compared over the ranks.
            resident: a block's states, oldest first, up to the one to announce; may be empty.
                None: the version that is due was lost with its worker.
        """
        versions = [-1] * len(self._table)
        self._pinned = {}
        for block in self._table.owned_by(self._group.rank):
            states = resident(block)
            if states is None:
                versions[block] = LOST
            elif states:
                self._pinned[block] = states
                versions[block] = states[-1].version
        self._poll = self._group.begin_poll(step, self._table.digest_number, prints, versions)

    def announce(self, installed: list[Install]) -> None:
        """Finish the poll and begin to broadcast what is newer than ``installed``.

        Raises `MismatchError` on all ranks when they disagree, `StateError` on all ranks when a
        version that was due at this very step is lost."""
        if self._poll is None:
            return
        poll, self._poll = self._poll, None
        blocks: dict[int, list[int]] = {}
        self._rows = {}
        for block, version in enumerate(self._group.finish_poll(poll)):
            if version == LOST:
                raise StateError(
                    f"the statistics of block {self._table.specs[block].name} were lost with their "
                    "worker, so install_delay cannot be kept: resume from a checkpoint, or use "
                    "install_delay=None, which goes on without them"
                )
            newer = version - installed[block].version
            if newer > 0:
                blocks.setdefault(self._table.owners[block], []).append(block)
                self._rows[block] = newer
        sizes = {owner: sum(map(self._room, mine)) for owner, mine in blocks.items()}
        rows = {owner: sum(self._rows[b] for b in mine) for owner, mine in blocks.items()}
        headers: dict[int, Tensor] = {}
        buckets: dict[int, Tensor] = {}
        rank = self._group.rank
        if rank in blocks:
            states = [self._pinned[block] for block in blocks[rank]]
            # A row for each version since the installed one: the log must know all that was folded.
            headers[rank] = torch.tensor(
                [
                    [s.version, s.since, s.through, int(s.route == "worker")]
                    for block, held in zip(blocks[rank], states, strict=True)
                    for s in held
                    if s.version > installed[block].version
                ]
            )
            host = torch.zeros(sizes[rank], dtype=torch.float32)
            parts = self._parts(host, blocks[rank])
            for block, part, held in zip(blocks[rank], parts, states, strict=True):
                self._share(block, held[-1].version, part.copy_(held[-1].flat))
            buckets[rank] = host.to(self._group.device)
        self._pinned = {}
        self._spread = self._group.begin_broadcast(blocks, rows, sizes, headers, buckets)

    def _share(self, block: int, version: int, flat: Tensor) -> None:
        """On a CPU an owner keeps a version once: where the training has it anyway."""
        if self._group.device.type == "cpu":
            self._depot.share(block, version, flat)

    def _room(self, block: int) -> int:
        """Numbers of a bucket that a block takes."""
        return -(-self._table.published_layouts[block].size // ALIGNED) * ALIGNED

    def _parts(self, bucket: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """The published layouts of these blocks in a bucket; views."""
        rooms = bucket.split([self._room(block) for block in blocks])
        sizes = [self._table.published_layouts[block].size for block in blocks]
        return [room[:size] for room, size in zip(rooms, sizes, strict=True)]

    def finish(self, step: int) -> list[Install]:
        """Finish the broadcasts; what all ranks install at ``step``, in the same order."""
        if self._spread is None:
            return []
        spread, self._spread = self._spread, None
        self._group.finish(spread.works)
        installs: list[Install] = []
        for owner, blocks in sorted(spread.blocks.items()):
            parts = self._parts(spread.buckets[owner], blocks)
            if len(blocks) < len(self._table.owned_by(owner)):
                # Blocks that are replaced at different steps must not keep each other's memory. (A
                # bucket of all may outlive most of its blocks: of an owner one at most does.)
                parts = [part.clone() for part in parts]
            heads = spread.headers[owner].tolist()
            position = 0
            for block, part in zip(blocks, parts, strict=True):
                end = position + self._rows[block]
                *passed, (version, since, through, worker) = heads[position:end]
                position = end
                if owner == self._group.rank:
                    self._share(block, version, part)
                installs.append(
                    Install(
                        block,
                        version,
                        since,
                        through,
                        step,
                        "worker" if worker else "inline",
                        part,
                        self._table.published_layouts[block].views(part),
                        tuple((v, first, last) for v, first, last, _ in passed),
                    )
                )
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
