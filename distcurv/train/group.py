"""The collectives of the training ranks, and the checks that ride on them.

Control vectors are CPU integers on a gloo group of our own; they carry the step, the hash of the
block table and fingerprints of the gradients and of the settings, so that ranks which disagree all
learn of it from the same reduced vector and all raise.  Tensors go over NCCL where the training
does, else gloo.  With one process (or without torch.distributed) every operation is the identity.
"""

from __future__ import annotations

import os
import socket
import zlib
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distcurv.errors import MismatchError

_HEAD = 4  # step, table hash, fingerprints


class Prints(NamedTuple):
    """Numbers that must be equal on all ranks: of the reduced gradients (0: not compared), and of
    the settings that change with the step."""

    gradients: int
    settings: int


@dataclass
class Poll:
    """A poll under way: the control vector and the all-reduce that will complete it."""

    vector: Tensor
    work: dist.Work | None


@dataclass
class Spread:
    """A broadcast under way: one header and one bucket per owner."""

    blocks: dict[int, list[int]]
    headers: dict[int, Tensor]
    buckets: dict[int, Tensor]
    works: list[dist.Work]


# Process groups are dear (threads, sockets), and all pipelines of a process issue their collectives
# in the same order on all ranks: they share them, by use and backend, as long as the world stands.
_GROUPS: dict[tuple[str, str], tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}


def _shared_group(use: str, backend: str) -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    kept = _GROUPS.get((use, backend))
    if kept is None or kept[0] is not world:
        kept = _GROUPS[use, backend] = (world, dist.new_group(backend=backend))
    return kept[1]


class RankGroup:
    """Collectives over the training ranks.

    Args:
        device: where statistics and preconditioners live on this rank.

    Must be constructed on all ranks together.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.world_size = dist.get_world_size() if self.distributed else 1
        self._control: dist.ProcessGroup | None = None
        self._tensors: dist.ProcessGroup | None = None
        self._stream_wait = False
        if self.world_size > 1:
            backend = "nccl" if device.type == "cuda" else "gloo"
            self._stream_wait = backend == "nccl"
            self._control = _shared_group("control", "gloo")
            self._tensors = _shared_group("tensors", backend)

    def nodes(self) -> list[int]:
        """A number per rank, equal for ranks on the same host (torchrun's node if it says so)."""
        node = os.environ.get("GROUP_RANK")
        mine = int(node) if node is not None else zlib.crc32(socket.gethostname().encode())
        return [int(n) for n in self.gather(torch.tensor([mine], dtype=torch.int64)).flatten()]

    def gather(self, vector: Tensor) -> Tensor:
        """All ranks' CPU vectors, stacked by rank."""
        if self._control is None:
            return vector.unsqueeze(0)
        out = [torch.empty_like(vector) for _ in range(self.world_size)]
        dist.all_gather(out, vector, group=self._control)
        return torch.stack(out)

    def from_rank_zero(self, vector: Tensor) -> Tensor:
        """Rank 0's CPU vector on every rank."""
        if self._control is not None:
            dist.broadcast(vector, src=0, group=self._control)
        return vector

    def agree(self, what: str, number: int, remedy: str) -> None:
        """Raise `MismatchError` on all ranks unless ``number`` (int64) is the same on all."""
        numbers = [int(n) for n in self.gather(torch.tensor([number])).flatten()]
        if len(set(numbers)) > 1:
            raise MismatchError(
                f"{what} differs between ranks {dict(enumerate(numbers))}: {remedy}"
            )

    def everywhere(self, flag: Tensor) -> Tensor:
        """Whether a flag (bool, without a dimension) is true on all ranks; no device is waited
        for."""
        if self._tensors is None:
            return flag
        common = flag.to(self.device, torch.float32)
        dist.all_reduce(common, op=dist.ReduceOp.MIN, group=self._tensors)
        return common > 0

    def begin_reduce(self, buckets: dict[int, Tensor]) -> list[dist.Work]:
        """Sum each owner's bucket to it; other ranks' buckets are garbage afterwards."""
        works = []
        if self._tensors is not None:
            for owner in sorted(buckets):
                if buckets[owner].numel():
                    work = dist.reduce(
                        buckets[owner], dst=owner, group=self._tensors, async_op=True
                    )
                    works += self._begun(work)
        return works

    def finish(self, works: list[dist.Work]) -> None:
        """Wait for collectives that were begun."""
        for work in works:
            work.wait()

    def arrived(self, work: dist.Work | None, timeout: float) -> bool:
        """Wait for a collective of the control group at most ``timeout`` s; whether it is done.

        It goes on when it is not, and may be waited for again."""
        if work is None:
            return True
        try:
            work.wait(timedelta(seconds=timeout))
        except RuntimeError:
            if work.is_completed():
                raise  # a connection broke: no matter of patience
            return False
        return True

    def begin_farewell(self) -> dist.Work | None:
        """Begin a collective that is done when all ranks have come to it."""
        if self._control is None:
            return None
        return dist.all_reduce(torch.zeros(1), group=self._control, async_op=True)

    def begin_poll(self, step: int, digest: int, prints: Prints, resident: list[int]) -> Poll:
        """Begin to all-reduce "newest version resident at its owner" (-1 where not owned)."""
        head = [step, digest, *prints]
        vector = torch.tensor(head + [-x for x in head] + resident, dtype=torch.int64)
        work = None
        if self._control is not None:
            work = dist.all_reduce(vector, op=dist.ReduceOp.MAX, group=self._control, async_op=True)
        return Poll(vector, work)

    def finish_poll(self, poll: Poll) -> list[int]:
        """The resident versions of all blocks; raises `MismatchError` on all ranks alike."""
        if poll.work is not None:
            poll.work.wait()
        numbers = [int(n) for n in poll.vector]
        high, low = numbers[:_HEAD], [-n for n in numbers[_HEAD : 2 * _HEAD]]
        if high[1] != low[1]:
            raise MismatchError(
                "the block tables of the training ranks differ: build the same model and the "
                "same config on every rank"
            )
        if high[0] != low[0]:
            raise MismatchError(
                f"the training ranks are at different steps ({low[0]} to {high[0]}): every rank "
                "must call step() once per training step (check load_state_dict on all ranks)"
            )
        if high[3] != low[3]:
            raise MismatchError(
                f"the settings of step {high[0]} differ between training ranks: an interval, a "
                "damping or a learning rate that is a function of the step must depend on the step "
                "alone, and one that is set between steps must be set alike on all ranks"
            )
        if high[2] != low[2]:
            raise MismatchError(
                f"the gradients differ between training ranks at the poll of step {high[0]}: "
                "either a rank skipped a step(), or step() was called before the gradients were "
                "reduced over ranks (use DistributedDataParallel or reduce them yourself)"
            )
        return numbers[2 * _HEAD :]

    def begin_broadcast(
        self,
        blocks: dict[int, list[int]],
        rows: dict[int, int],
        sizes: dict[int, int],
        headers: dict[int, Tensor],
        buckets: dict[int, Tensor],
    ) -> Spread:
        """Begin one header and one bucket broadcast per owner with announced blocks.

        Args:
            blocks: announced blocks by owner; the same on all ranks.
            rows: rows in each owner's header; the same on all ranks.
            sizes: numbers in each owner's bucket; the same on all ranks.
            headers, buckets: filled by this rank where it is the owner.
        """
        works: list[dist.Work] = []
        for owner in sorted(blocks):
            if owner not in headers:
                headers[owner] = torch.zeros(rows[owner], 4, dtype=torch.int64)
                buckets[owner] = torch.empty(sizes[owner], dtype=torch.float32, device=self.device)
            if self._control is not None and self._tensors is not None:
                work = dist.broadcast(headers[owner], src=owner, group=self._control, async_op=True)
                works += [work] if work is not None else []
                work = dist.broadcast(buckets[owner], src=owner, group=self._tensors, async_op=True)
                works += self._begun(work)
        return Spread(blocks, headers, buckets, works)

    def _begun(self, work: dist.Work | None) -> list[dist.Work]:
        """What is left to wait for.  On NCCL wait() only makes the stream wait: that is done at
        once, before DDP's group is used again."""
        if work is None:
            return []
        if self._stream_wait:
            work.wait()
            return []
        return [work]
