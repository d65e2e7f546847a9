"""Block specs and statistics for the tests of kinds; a new kind adds its specs to both tables."""

from __future__ import annotations

import pytest
import torch
from oracles import generator

from distcurv.curvature.spec import BlockSpec, SideSpec, Tensors
from distcurv.curvature.statistics import encode_rows

DIM_A, DIM_G, DECAY, DAMPING = 7, 5, 0.8, 1e-2


def low_rank_spec(rank: int, tail: str, encoding: str, name: str = "block") -> BlockSpec:
    sides = tuple(SideSpec(dim, min(rank, dim), tail, encoding) for dim in (DIM_A, DIM_G))
    return BlockSpec(name, "lowrank", sides, DECAY, DAMPING)


def dense_spec(name: str = "block", relative: bool = False) -> BlockSpec:
    sides = (SideSpec(DIM_A, 1, "none", "dense"), SideSpec(DIM_G, 1, "none", "dense"))
    return BlockSpec(name, "dense", sides, DECAY, DAMPING, relative)


# Per kind: specs that must meet the dense oracle, and specs for everything else.
EXACT: dict[str, list[BlockSpec]] = {
    "lowrank": [
        low_rank_spec(DIM_A, tail, encoding)
        for tail in ("none", "isotropic", "diagonal")
        for encoding in ("sketch", "dense")
    ],
    "dense": [dense_spec(), dense_spec(relative=True)],
}
APPROXIMATE: dict[str, list[BlockSpec]] = {
    "lowrank": [
        low_rank_spec(rank, tail, encoding)
        for rank in (1, 3)
        for tail in ("none", "isotropic", "diagonal")
        for encoding in ("sketch", "dense")
    ],
    "dense": [],
}
EXACT_SPECS = [spec for specs in EXACT.values() for spec in specs]
SPECS = EXACT_SPECS + [spec for specs in APPROXIMATE.values() for spec in specs]


def describe(spec: BlockSpec) -> str:
    side = spec.sides[0]
    return f"{spec.kind}-r{side.rank}-{side.tail}-{side.encoding}-{spec.relative_damping}"


each_spec = pytest.mark.parametrize("spec", SPECS, ids=describe)


def batched(tensors: Tensors, size: int = 1) -> Tensors:
    return {name: torch.stack([tensor] * size) for name, tensor in tensors.items()}


def part(tensors: Tensors, i: int) -> Tensors:
    return {name: tensor[i : i + 1] for name, tensor in tensors.items()}


def rows_of(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """20 rows for each side, with a spread of variances."""
    spread = {"A": 2.0 ** -torch.arange(DIM_A), "G": 1.5 ** -torch.arange(DIM_G)}
    return {
        name: scale * torch.randn(20, len(s), generator=generator(seed)) * s
        for name, s in spread.items()
    }


def statistic_of(
    spec: BlockSpec, rows: dict[str, torch.Tensor], basis: Tensors, steps: int
) -> Tensors:
    """A batch of one, from rows of both sides."""
    statistic: Tensors = {}
    for name, side in spec.named_sides():
        U = basis[f"{name}.U"] if side.encoding == "sketch" else None
        encoded = encode_rows(side, rows[name].unsqueeze(0), U)
        statistic.update({f"{name}.{key}": value for key, value in encoded.items()})
        statistic[f"{name}.count"] = torch.tensor([float(len(rows[name]))])
    statistic["steps"] = torch.tensor([float(steps)])
    return statistic


def mean_of(rows: torch.Tensor) -> torch.Tensor:
    return rows.double().mT @ rows.double() / len(rows)
