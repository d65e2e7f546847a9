"""Block specs and statistics for the tests of kinds; a new kind adds its specs to both tables, and
a new encoding its statistic and its factor."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from oracles import generator

from distcurv.curvature.damping import split_damping
from distcurv.curvature.spec import BlockSpec, SideSpec, Tensors
from distcurv.curvature.statistics import encode_rows

DIM_A, DIM_G, DIM_F, DECAY, DAMPING = 7, 5, 6, 0.8, 1e-2


def low_rank_spec(rank: int, tail: str, encoding: str, name: str = "block") -> BlockSpec:
    sides = tuple(SideSpec(dim, min(rank, dim), tail, encoding) for dim in (DIM_A, DIM_G))
    return BlockSpec(name, "lowrank", sides, DECAY, DAMPING)


def dense_spec(name: str = "block", relative: bool = False) -> BlockSpec:
    sides = (SideSpec(DIM_A, 1, "none", "dense"), SideSpec(DIM_G, 1, "none", "dense"))
    return BlockSpec(name, "dense", sides, DECAY, DAMPING, relative)


def diagonal_side(dim: int) -> SideSpec:
    return SideSpec(dim, 0, "diagonal", "diagonal")


def with_diagonal(spec: BlockSpec, *which: int, relative: bool = False) -> BlockSpec:
    """The spec with the sides of these indices made diagonals."""
    sides = tuple(
        diagonal_side(side.dim) if i in which else side for i, side in enumerate(spec.sides)
    )
    return BlockSpec(spec.name, spec.kind, sides, spec.decay, spec.damping, relative)


def one_sided_spec(kind: str, name: str = "block", relative: bool = False) -> BlockSpec:
    encoding = {"diagonal": "diagonal", "unitwise": "unit"}[kind]
    side = SideSpec(DIM_F, 0, "diagonal", encoding)
    return BlockSpec(name, kind, (side,), DECAY, DAMPING, relative)


def shampoo_spec(sides: int, power: float, relative: bool = False) -> BlockSpec:
    dims = {1: (DIM_F,), 2: (DIM_A, DIM_G)}.get(sides, (3, DIM_G, 2))
    made = tuple(SideSpec(dim, dim, "none", "dense") for dim in dims)
    return BlockSpec("block", "shampoo", made, DECAY, DAMPING, relative, power)


def fisher_spec(kind: str, units: int = 1, relative: bool = False) -> BlockSpec:
    side = SideSpec(DIM_F, DIM_F, "none", "dense", units)
    return BlockSpec("block", kind, (side,), DECAY, DAMPING, relative)


def kfe_spec(relative: bool = False) -> BlockSpec:
    sides = tuple(SideSpec(dim, dim, "none", "dense") for dim in (DIM_A, DIM_G))
    return BlockSpec("block", "kfe", sides, DECAY, DAMPING, relative)


# Per kind: specs that must meet the dense oracle, and specs for everything else.
EXACT: dict[str, list[BlockSpec]] = {
    "lowrank": [
        *(
            low_rank_spec(DIM_A, tail, encoding)
            for tail in ("none", "isotropic", "diagonal")
            for encoding in ("sketch", "dense")
        ),
        with_diagonal(low_rank_spec(DIM_A, "diagonal", "sketch"), 0),
        with_diagonal(low_rank_spec(DIM_A, "isotropic", "dense"), 1, relative=True),
        with_diagonal(low_rank_spec(DIM_A, "isotropic", "sketch"), 0, 1),
    ],
    "dense": [
        dense_spec(),
        dense_spec(relative=True),
        with_diagonal(dense_spec(), 0),
        with_diagonal(dense_spec(), 1, relative=True),
        with_diagonal(dense_spec(), 0, 1),
    ],
    "diagonal": [one_sided_spec("diagonal"), one_sided_spec("diagonal", relative=True)],
    "unitwise": [one_sided_spec("unitwise"), one_sided_spec("unitwise", relative=True)],
    "shampoo": [
        shampoo_spec(2, 0.25),
        shampoo_spec(2, 1.0, relative=True),
        shampoo_spec(3, 1 / 6, relative=True),
        shampoo_spec(1, 0.5),
    ],
    "layer_wise": [fisher_spec("layer_wise"), fisher_spec("layer_wise", relative=True)],
    "unit_rows": [fisher_spec("unit_rows", 2), fisher_spec("unit_rows", 2, relative=True)],
    "full": [fisher_spec("full")],
    "kfe": [kfe_spec(), kfe_spec(relative=True)],
}
APPROXIMATE: dict[str, list[BlockSpec]] = {
    "lowrank": [
        low_rank_spec(rank, tail, encoding)
        for rank in (1, 3)
        for tail in ("none", "isotropic", "diagonal")
        for encoding in ("sketch", "dense")
    ],
    "dense": [],
    "diagonal": [],
    "unitwise": [],
    "shampoo": [],
    "layer_wise": [],
    "unit_rows": [],
    "full": [],
    "kfe": [],
}
EXACT_SPECS = [spec for specs in EXACT.values() for spec in specs]
SPECS = EXACT_SPECS + [spec for specs in APPROXIMATE.values() for spec in specs]
# Of a gradient alone; what kfe takes beside is of per-sample gradients.
TWO_SIDED = [spec for spec in SPECS if len(spec.sides) == 2 and spec.kind != "kfe"]


def describe(spec: BlockSpec) -> str:
    sides = [f"r{side.rank}-{side.tail}-{side.encoding}" for side in spec.sides]
    if len({side.encoding for side in spec.sides}) == 1:
        sides = sides[:1]
    return "-".join([spec.kind, *sides, "relative" if spec.relative_damping else "absolute"])


each_spec = pytest.mark.parametrize("spec", SPECS, ids=describe)


def batched(tensors: Tensors, size: int = 1) -> Tensors:
    return {name: torch.stack([tensor] * size) for name, tensor in tensors.items()}


def part(tensors: Tensors, i: int) -> Tensors:
    return {name: tensor[i : i + 1] for name, tensor in tensors.items()}


def rows_of(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """20 rows for each side, with a spread of variances; those of F are the gradients of DIM_F
    weights and of as many biases."""
    spread = {
        "A": 2.0 ** -torch.arange(DIM_A),
        "G": 1.5 ** -torch.arange(DIM_G),
        "F": 1.2 ** -torch.arange(2 * DIM_F),
        **{f"M{i}": 1.1 ** -torch.arange(dim) for i, dim in enumerate((3, DIM_G, 2))},
    }
    rows = {
        name: scale * torch.randn(20, len(s), generator=generator(seed)) * s
        for name, s in spread.items()
    }
    rows["F"][:, DIM_F:] += 0.5 * rows["F"][:, :DIM_F]  # weight and bias of a unit are related
    return rows


def statistic_of(
    spec: BlockSpec, rows: dict[str, torch.Tensor], basis: Tensors, steps: int
) -> Tensors:
    """A batch of one, from rows of all sides."""
    statistic: Tensors = {}
    for name, side in spec.named_sides():
        own = rows[name].unsqueeze(0)
        if side.encoding == "unit":
            w, b = own.split(side.dim, -1)
            encoded = {"ww": (w * w).sum(1), "wb": (w * b).sum(1), "bb": (b * b).sum(1)}
        elif side.units > 1:
            parts = [encode_rows(side, part, None) for part in own.split(side.dim, -1)]
            encoded = {"packed": torch.cat([part["packed"] for part in parts], -1)}
        else:
            U = basis[f"{name}.U"] if side.encoding == "sketch" else None
            encoded = encode_rows(side, own[..., : side.dim], U)
        statistic.update({f"{name}.{key}": value for key, value in encoded.items()})
        statistic[f"{name}.count"] = torch.tensor([float(len(rows[name]))])
    if spec.kind == "kfe":
        projected = [rows[name] @ basis[f"{name}.U"] for name in ("G", "A")]
        samples = torch.einsum("bno,bni->bnoi", *projected)
        statistic["S.squares"] = samples.square().sum(1)
    statistic["steps"] = torch.tensor([float(steps)])
    return statistic


def mean_of(rows: torch.Tensor) -> torch.Tensor:
    return rows.double().mT @ rows.double() / len(rows)


def factor_of(side: SideSpec, rows: torch.Tensor) -> torch.Tensor:
    """What a side's statistic is the mean of: [d, d], or [d, 2, 2] or [u, d, d] unit by unit."""
    whole = mean_of(rows)
    if side.units > 1:
        starts = range(0, side.units * side.dim, side.dim)
        return torch.stack([whole[i : i + side.dim, i : i + side.dim] for i in starts])
    if side.encoding == "unit":
        pairs = [[i, side.dim + i] for i in range(side.dim)]
        return torch.stack([whole[pair][:, pair] for pair in pairs])
    own = whole[: side.dim, : side.dim]
    return torch.diag(own.diagonal()) if side.encoding == "diagonal" else own


def inverses_of(spec: BlockSpec, factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What a spec's damped factors are inverted to, by the definition; of kfe (see test_kfe.py)
    where all samples are alike, so that the product of the sides is the Fisher matrix."""
    if spec.kind == "kfe":
        A, G = factors
        fisher = torch.kron(G, A)
        delta = DAMPING * (fisher.trace() / len(fisher) if spec.relative_damping else 1.0)
        return [torch.linalg.inv(fisher + delta * torch.eye(len(fisher)))]
    traces = [trace_of(factor) for factor in factors]
    dims = [side.dim * side.units for side in spec.sides]
    if spec.kind == "shampoo":  # each side has the whole damping
        means = [trace / dim for trace, dim in zip(traces, dims, strict=True)]
        deltas = [
            mean * DAMPING if spec.relative_damping else torch.tensor(DAMPING) for mean in means
        ]
    else:
        deltas = list(split_damping(DAMPING, traces, dims, spec.relative_damping))
    damped = [f + d * torch.eye(f.shape[-1]) for f, d in zip(factors, deltas, strict=True)]
    if spec.power == 1.0:
        return [torch.linalg.inv(matrix) for matrix in damped]
    pairs = [torch.linalg.eigh(matrix) for matrix in damped]
    return [U @ torch.diag(lam**-spec.power) @ U.mT for lam, U in pairs]


def trace_of(factor: torch.Tensor) -> torch.Tensor:
    return factor.diagonal(dim1=-2, dim2=-1).sum()
