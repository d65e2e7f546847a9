"""Which statistics to fold next: a pure function, so that every rule can be put in a table.

Each waiting statistic gets a due time: its arrival plus `patience` seconds, less the share of
that which its block's last residual (innovation, 0..1) is worth.  Earliest due time first is
"oldest and largest residual first", and it cannot starve anybody: once a statistic has waited
`patience` seconds, nothing that arrives later comes before it.

Only blocks of one shape *and of one message* share a call.  Batched matrix products may round
differently for another batch size, so a batch that depended on who else happened to wait would
break the promise that a run over sockets equals the in-process run bit for bit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass

from distcurv.worker.settings import WorkerSettings


@dataclass(frozen=True)
class Waiting:
    """The oldest unfolded statistic of a block that is not being refreshed at the moment."""

    session: int  # ordinal of the session
    block: int  # index into the session's table
    seq: int  # message that brought it
    shape_key: Hashable  # BlockSpec.shape_key()
    arrived: float  # seconds, on the same clock as `now`
    nbytes: int  # that its refresh will publish
    innovation: float  # of the block's last refresh; below 0: there was none

    def due(self, patience: float) -> float:
        """When this statistic should be folded, in seconds on the clock of ``arrived``."""
        residual = 1.0 if self.innovation < 0 else min(self.innovation, 1.0)
        return self.arrived + patience * (1.0 - residual)


@dataclass(frozen=True)
class Snapshot:
    """All that waits in a worker."""

    waiting: tuple[Waiting, ...]


@dataclass(frozen=True)
class Pick:
    """One refresh call: these blocks of this message."""

    session: int
    seq: int
    blocks: tuple[int, ...]


def plan(now: float, snapshot: Snapshot, settings: WorkerSettings) -> tuple[list[Pick], str]:
    """All refresh calls that the snapshot asks for, most urgent first, and why the first is."""
    groups: dict[Hashable, list[Waiting]] = defaultdict(list)
    for entry in snapshot.waiting:
        groups[(entry.session, entry.seq, entry.shape_key)].append(entry)

    def order(entry: Waiting) -> tuple[float, int, int, int]:
        return (entry.due(settings.patience), entry.session, entry.seq, entry.block)

    batches: list[list[Waiting]] = []
    for group in groups.values():
        group.sort(key=order)
        share = settings.max_batch_bytes // max(1, group[0].nbytes)  # equal shapes, equal bytes
        size = max(1, min(settings.max_batch, share))
        batches += [group[start : start + size] for start in range(0, len(group), size)]
    if not batches:
        return [], "nothing waits"
    batches.sort(key=lambda batch: order(batch[0]))
    first = batches[0][0]
    reason = (
        f"session {first.session} block {first.block} waited {now - first.arrived:.3f} s "
        f"with residual {first.innovation:.3g}; {len(batches) - 1} more calls wait"
    )
    picks = [
        Pick(batch[0].session, batch[0].seq, tuple(entry.block for entry in batch))
        for batch in batches
    ]
    return picks, reason
