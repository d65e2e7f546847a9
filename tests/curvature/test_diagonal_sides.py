"""Kronecker sides that are diagonals by nature, in the kinds that take them.

Oracle: the dense float64 factors, damped and inverted; float32 against it 1e-5.
"""

from __future__ import annotations

import pytest
import torch
from kind_cases import (
    DAMPING,
    DIM_A,
    DIM_G,
    batched,
    dense_spec,
    diagonal_side,
    factor_of,
    low_rank_spec,
    rows_of,
    statistic_of,
    with_diagonal,
)
from oracles import generator, kronecker_solve, relative_error

from distcurv.curvature.apply import AffineGradient, ThinFactors, apply, finish, prepare_block
from distcurv.curvature.damping import split_damping
from distcurv.curvature.inverse import FLOOR, LowRankInverse, invert_diagonal
from distcurv.curvature.kinds import KINDS
from distcurv.curvature.kinds.kind import Refreshed
from distcurv.curvature.lowrank import turned_basis
from distcurv.curvature.spec import BlockSpec, SideSpec, Tensors
from distcurv.errors import NumericsError

LOW_RANK = low_rank_spec(3, "isotropic", "sketch")


def refreshed_once(spec: BlockSpec, statistic: Tensors) -> Refreshed:
    kind = KINDS[spec.kind]
    start = batched(kind.start(spec, seed=0))
    return kind.refresh(spec, kind.seed(spec, start), statistic, start)


def counts_statistic(spec: BlockSpec, counts: list[float]) -> Tensors:
    """Side A saw each index so often, as an embedding does; G as any layer."""
    start = batched(KINDS[spec.kind].start(spec, seed=0))
    statistic = statistic_of(spec, rows_of(0), start, 1)
    statistic["A.diag"] = torch.tensor([counts])
    statistic["A.count"] = torch.tensor([sum(counts)])
    return statistic


def test_low_rank_publishes_a_diagonal_without_a_basis() -> None:
    spec = with_diagonal(LOW_RANK, 0)
    kind = KINDS["lowrank"]
    assert list(kind.statistic_layout(spec))[:2] == ["A.diag", "A.count"]
    shapes = kind.published_layout(spec).shapes
    assert {n: s for n, s in shapes.items() if n.startswith("A.")} == {
        "A.tail": (DIM_A,),
        "A.trace": (),
        "A.weight": (),
    }
    assert shapes["G.U"] == (DIM_G, 3)
    start = batched(kind.start(spec, seed=0))
    turned = turned_basis(spec, start, statistic_of(spec, rows_of(0), start, 1))
    assert set(turned) == set(start)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("kind", ["lowrank", "dense"])
def test_the_direction_is_that_of_the_kronecker_product(
    kind: str, which: tuple[int, ...], bias: bool
) -> None:
    base = dense_spec() if kind == "dense" else low_rank_spec(DIM_A, "isotropic", "sketch")
    spec = with_diagonal(base, *which)
    start = batched(KINDS[kind].start(spec, seed=0))
    rows = rows_of(0)
    new = refreshed_once(spec, statistic_of(spec, rows, start, 1))
    published = {name: tensor[0] for name, tensor in new.published.items()}
    factors = [factor_of(side, rows[name]) for name, side in spec.named_sides()]
    deltas = split_damping(DAMPING, [f.trace() for f in factors], [DIM_A, DIM_G], False)
    A, G = (f + delta * torch.eye(len(f)) for f, delta in zip(factors, deltas, strict=True))
    matrix = torch.randn(DIM_G, DIM_A, generator=generator(1))
    grad = AffineGradient(matrix.clone(), None)
    if bias:
        grad = AffineGradient(matrix[:, :-1].contiguous(), matrix[:, -1].contiguous())
    prepared = prepare_block(KINDS[kind].inverses(spec, published, DAMPING, False), bias=bias)
    assert isinstance(prepared, ThinFactors) == (kind == "lowrank" or which == (0, 1))
    finish(grad, apply(prepared, grad).row_O1, None)
    assert relative_error(grad.whole(), kronecker_solve(A, G, matrix)) < 1e-5


@pytest.mark.parametrize("spec", [with_diagonal(LOW_RANK, 0), with_diagonal(dense_spec(), 0)])
def test_no_entry_is_taken_below_the_floor(spec: BlockSpec) -> None:
    kind = KINDS[spec.kind]
    small = BlockSpec(spec.name, spec.kind, spec.sides, spec.decay, damping=1e-8)
    counts = [1e6, 1e5, 10.0, 1.0, 0.0, 0.0, 0.0]
    new = refreshed_once(small, counts_statistic(small, counts))
    inverse = kind.inverses(small, new.published, 1e-8, relative=False)[0]
    assert isinstance(inverse, LowRankInverse)
    assert inverse.W_dr.shape == (1, DIM_A, 0)
    diagonal = torch.tensor(counts).double() / sum(counts)
    delta = split_damping(1e-8, [f.double() for f in _traces(new)], [DIM_A, DIM_G], False)[0]
    wanted = 1 / (diagonal + delta).clamp(min=FLOOR * diagonal.max().item())
    assert relative_error(inverse.inv_diag[0], wanted) < 1e-5
    assert inverse.inv_diag.max().item() == pytest.approx(
        1 / (FLOOR * diagonal[0].item()), rel=1e-4
    )


def _traces(new: Refreshed) -> list[torch.Tensor]:
    return [new.published[f"{name}.trace"][0] for name in ("A", "G")]


def test_the_floor_loses_nothing_of_a_dense_block_that_is_seeded() -> None:
    spec = BlockSpec("b", "dense", with_diagonal(dense_spec(), 0).sides, 0.9, damping=1e-6)
    counts = [1e6, 1e5, 10.0, 1.0, 0.0, 0.0, 0.0]
    new = refreshed_once(spec, counts_statistic(spec, counts))
    seeded = KINDS["dense"].seed(spec, new.published)
    # Each entry to float32's share of itself and its damping, whatever the largest is.
    error = (seeded["A.diag"] - new.state["A.diag"]).abs()
    assert bool((error <= 2e-7 * (new.state["A.diag"] + new.published["A.damping"])).all())


def test_dense_without_damping_refuses_an_index_that_was_never_seen() -> None:
    spec = BlockSpec("b", "dense", with_diagonal(dense_spec(), 0).sides, 0.9, damping=0.0)
    with pytest.raises(NumericsError, match="raise the damping"):
        refreshed_once(spec, counts_statistic(spec, [3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 0.0]))


def test_a_diagonal_of_zeros_without_damping_is_inverted_as_the_identity() -> None:
    inverse = invert_diagonal(torch.zeros(2, 3), torch.tensor([0.0, 0.5]))
    assert torch.equal(inverse.inv_diag, torch.tensor([[1.0] * 3, [2.0] * 3]))
    assert torch.equal(inverse.dense()[1], 2 * torch.eye(3))


def test_a_single_index() -> None:
    """d = 1: a diagonal of one number is no multiple of the identity by mistake."""
    sides = (diagonal_side(1), SideSpec(DIM_G, DIM_G, "isotropic", "sketch"))
    spec = BlockSpec("b", "lowrank", sides, 0.9)
    start = batched(KINDS["lowrank"].start(spec, seed=0))
    new = refreshed_once(spec, statistic_of(spec, rows_of(0), start, 1))
    published = {name: tensor[0] for name, tensor in new.published.items()}
    inverse_A, inverse_G = KINDS["lowrank"].inverses(spec, published, DAMPING, False)
    matrix = torch.randn(DIM_G, 1, generator=generator(1))
    grad = AffineGradient(matrix.clone(), None)
    prepared = prepare_block((inverse_A, inverse_G), bias=False)
    finish(grad, apply(prepared, grad).row_O1, None)
    assert relative_error(grad.whole(), inverse_G.dense() @ matrix @ inverse_A.dense()) < 1e-5
