"""Sums over the ranks that a parameter is sharded over: many small tensors, one all-reduce.

The training ranks begin and wait for it within one step(), in the same order on all of them: what
is summed depends on shapes, installs and the timetable alone.  For a shard of one rank nothing is
communicated; under HSDP the replicas do the same side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class ShardSums:
    """Sums under way.

    Args:
        groups: by item, the ranks to sum over; the same list on all of a group's ranks.
        addends: by item, tensors of one device; summed in float32.
    """

    def __init__(
        self, groups: Sequence[dist.ProcessGroup], addends: Sequence[Sequence[Tensor]]
    ) -> None:
        self._addends = addends
        self._buckets: list[tuple[list[int], Tensor, dist.Work | None]] = []
        items_of: dict[dist.ProcessGroup, list[int]] = {}
        for item, group in enumerate(groups):
            if addends[item]:
                items_of.setdefault(group, []).append(item)
        for group, items in items_of.items():
            parts = [part.reshape(-1).float() for item in items for part in addends[item]]
            bucket = torch.cat(parts)
            work = None
            if dist.get_world_size(group) > 1 and bucket.numel():
                work = dist.all_reduce(bucket, group=group, async_op=True)
            self._buckets.append((items, bucket, work))

    def finish(self) -> list[list[Tensor]]:
        """Wait for them; by item, the sums in the shapes of the addends, in float32."""
        sums: list[list[Tensor]] = [[] for _ in self._addends]
        for items, bucket, work in self._buckets:
            if work is not None:
                work.wait()
            addends = [(item, part) for item in items for part in self._addends[item]]
            pieces = bucket.split([part.numel() for _, part in addends])
            for (item, part), piece in zip(addends, pieces, strict=True):
                sums[item].append(piece.view(part.shape))
        return sums
