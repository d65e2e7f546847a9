"""The block table: which blocks exist, how their buffers look and which rank owns each.

It is the same on every training rank, made from shapes alone, and its hash travels with every
session and every control vector, so that two ranks with different models notice at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from distcurv.curvature.kinds import KINDS
from distcurv.curvature.spec import RANKLESS, BlockSpec, Layout
from distcurv.errors import ConfigError


def refresh_cost(spec: BlockSpec) -> float:
    """Rough cost of one refresh of a block, in multiply-adds: d r^2 low rank, d^3 for matrices, and
    d where a factor has no basis."""
    cost = 0.0
    for side in spec.sides:
        if side.encoding in RANKLESS:
            cost += side.dim
        else:
            cost += side.dim * side.rank**2 if spec.kind == "lowrank" else side.dim**3 * side.units
    return cost


def longest_processing_time(costs: Sequence[float], bins: int) -> list[int]:
    """The bin of each item: items by falling cost, each to the least loaded bin.

    Ties are broken by index, so every rank gets the same answer."""
    loads = [0.0] * bins
    chosen = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        target = min(range(bins), key=lambda b: (loads[b], b))
        chosen[item] = target
        loads[target] += costs[item]
    return chosen


def owner_ranks(nodes: Sequence[int], max_owners: int) -> list[int]:
    """At most ``max_owners`` ranks, one per node first.

    Args:
        nodes: the node of each rank, by rank.
        max_owners: upper bound of the result's length.
    """
    by_node: dict[int, list[int]] = {}
    for rank, node in enumerate(nodes):
        by_node.setdefault(node, []).append(rank)
    order: list[int] = []
    depth = 0
    while len(order) < len(nodes):
        order += [ranks[depth] for ranks in by_node.values() if depth < len(ranks)]
        depth += 1
    return sorted(order[:max_owners])


@dataclass(frozen=True)
class BlockTable:
    """All blocks of a job in order, with their owners and layouts."""

    specs: tuple[BlockSpec, ...]
    owners: tuple[int, ...]
    statistic_layouts: tuple[Layout, ...] = field(repr=False)
    published_layouts: tuple[Layout, ...] = field(repr=False)
    digest: bytes = field(repr=False)

    @classmethod
    def make(cls, specs: Sequence[BlockSpec], nodes: Sequence[int], max_owners: int) -> BlockTable:
        """A table for a job whose rank i runs on node ``nodes[i]``.

        Raises `ConfigError` for duplicate names or an unknown kind."""
        names = [spec.name for spec in specs]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ConfigError(f"block names are not unique: {', '.join(doubled)}; rename them")
        for spec in specs:
            if spec.kind not in KINDS:
                raise ConfigError(
                    f"block {spec.name} has kind {spec.kind!r}: known are {', '.join(KINDS)}"
                )
        ranks = owner_ranks(nodes, max_owners)
        costs = [refresh_cost(spec) for spec in specs]
        owners = tuple(ranks[b] for b in longest_processing_time(costs, len(ranks)))
        text = json.dumps([[spec.to_fields() for spec in specs], list(owners)], sort_keys=True)
        return cls(
            specs=tuple(specs),
            owners=owners,
            statistic_layouts=tuple(KINDS[s.kind].statistic_layout(s) for s in specs),
            published_layouts=tuple(KINDS[s.kind].published_layout(s) for s in specs),
            digest=hashlib.sha256(text.encode()).digest(),
        )

    def __len__(self) -> int:
        return len(self.specs)

    def owned_by(self, rank: int) -> list[int]:
        """Indices of the blocks that a rank owns, in table order."""
        return [index for index, owner in enumerate(self.owners) if owner == rank]

    @property
    def digest_number(self) -> int:
        """The hash as a positive 62-bit integer, for control vectors."""
        return int.from_bytes(self.digest[:8], "big") >> 2
