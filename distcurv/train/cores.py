"""Which cores the training ranks leave free on each node, so that a worker would disturb nobody.

A worker inherits the cores of the rank that starts it, the first of its node; so what counts is
what that rank may use, less one core for every rank that may use some of the same.  Threads that
a rank starts beside its first one are not counted: they are seldom busy all the time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_MASK_BYTES = 128  # cores 0 to 1023; further ones are not seen
_LIMIT_BYTES = 2
_NO_LIMIT = 2 ** (8 * _LIMIT_BYTES) - 1
_CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")


class Cores(NamedTuple):
    """The numbers of the cores that a process may use, and of how many at a time."""

    numbers: frozenset[int]
    limit: int


def own_cores() -> Cores:
    """Of this process, from its affinity and (Linux, cgroup v2) its container's limit."""
    if hasattr(os, "sched_getaffinity"):
        numbers = frozenset(os.sched_getaffinity(0))
    else:
        numbers = frozenset(range(os.cpu_count() or 1))
    limit = _NO_LIMIT
    if _CGROUP_LIMIT.exists():
        quota, period = _CGROUP_LIMIT.read_text(encoding="ascii").split()
        if quota != "max":
            limit = min(limit, int(quota) // int(period))
    return Cores(frozenset(n for n in numbers if n < 8 * _MASK_BYTES), limit)


def to_vector(cores: Cores) -> Tensor:
    """uint8 of fixed length, to be gathered; see `from_vector`."""
    mask = sum(1 << n for n in cores.numbers)
    raw = mask.to_bytes(_MASK_BYTES, "little") + cores.limit.to_bytes(_LIMIT_BYTES, "little")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def from_vector(vector: Tensor) -> Cores:
    """What `to_vector` was given."""
    raw = bytes(vector.tolist())
    mask = int.from_bytes(raw[:_MASK_BYTES], "little")
    numbers = frozenset(n for n in range(8 * _MASK_BYTES) if mask >> n & 1)
    return Cores(numbers, int.from_bytes(raw[_MASK_BYTES:], "little"))


def spare_cores(nodes: Sequence[int], cores: Sequence[Cores]) -> list[int]:
    """Cores beyond the training ranks' own, by node in order of first rank; below 0 where ranks
    share cores.

    Args:
        nodes: a number per rank, equal on one node.
        cores: of each rank.
    """
    spare = []
    for node in dict.fromkeys(nodes):
        ranks = [rank for rank, other in enumerate(nodes) if other == node]
        first = cores[ranks[0]]
        rivals = sum(bool(cores[rank].numbers & first.numbers) for rank in ranks)
        spare.append(min(len(first.numbers), first.limit) - rivals)
    return spare
