"""The factored inverse against `torch.linalg.inv`, Sherman–Morrison and the Kronecker product.

Tolerances: in float64 1e-12 · lam/D, the loss of the difference of two numbers of size 1/D. In
float32 the same with eps 1e-7 instead of 2e-16, so 1e-6 · lam/D.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import generator, kronecker_solve, low_rank_matrix, orthonormal, psd, relative_error

from distcurv.curvature.estimate import Estimate
from distcurv.curvature.inverse import (
    FLOOR,
    DenseInverse,
    LowRankInverse,
    apply_left,
    apply_right,
    apply_sides,
    invert_low_rank,
    sherman_morrison_inverse,
)

TAILS = ["none", "isotropic", "diagonal"]


def make(d: int, r: int, tail: str, top: float, seed: int) -> Estimate:
    """Eigenvalues from ``top`` down to about 1 over a tail of 0.2 to 0.9."""
    U = orthonormal(d, r, seed)
    lam = torch.logspace(0, 0, r, dtype=torch.float64)
    lam = lam + torch.linspace(top - 1, 0, r, dtype=torch.float64)
    value: torch.Tensor | None = None
    if tail == "isotropic":
        value = torch.full((1,), 0.0 if r == d else 0.5, dtype=torch.float64)
    if tail == "diagonal":
        value = 0.2 + 0.7 * torch.rand(d, generator=generator(seed), dtype=torch.float64)
    return Estimate(U, lam, value, low_rank_matrix(U, lam, value).trace())


def damped(estimate: Estimate, damping: float) -> torch.Tensor:
    matrix = low_rank_matrix(estimate.U_dr, estimate.lam_r, estimate.tail)
    return matrix + damping * torch.eye(len(matrix), dtype=torch.float64)


@given(
    tail=st.sampled_from(TAILS),
    d=st.integers(1, 14),
    rank_share=st.floats(0.05, 1.0),
    top=st.floats(1.0, 500.0),
    damping=st.floats(0.1, 3.0),
    seed=st.integers(0, 1000),
)
def test_equals_the_dense_inverse_in_float64(
    tail: str, d: int, rank_share: float, top: float, damping: float, seed: int
) -> None:
    r = max(1, round(rank_share * d))
    estimate = make(d, r, tail, top, seed)
    got = invert_low_rank(estimate, torch.tensor(damping, dtype=torch.float64))
    wanted = torch.linalg.inv(damped(estimate, damping))
    assert got.inv_diag.shape == (d if tail == "diagonal" else 1,)
    error = (got.dense() - wanted).abs().max() * damping  # in units of the largest 1/D
    assert error.item() < 1e-12 * max(1.0, top / damping)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("top", [1.0, 1e2, 1e3])
def test_equals_recursive_sherman_morrison(tail: str, top: float) -> None:
    estimate = make(12, 5, tail, top, seed=1)
    damping = 0.3
    tail_value = torch.zeros(1, dtype=torch.float64) if estimate.tail is None else estimate.tail
    weights = estimate.low_rank_weights()
    reference = sherman_morrison_inverse(tail_value + damping, estimate.U_dr, weights)
    got = invert_low_rank(estimate, torch.tensor(damping, dtype=torch.float64))
    assert (got.dense() - reference.dense()).abs().max().item() < 1e-12 * top / damping
    wanted = torch.linalg.inv(damped(estimate, damping))
    assert (reference.dense() - wanted).abs().max().item() < 1e-12 * top / damping
    # Columns of W are unique up to sign, so the two forms agree column by column.
    assert relative_error(got.W_dr.abs(), reference.W_dr.abs()) < 1e-10


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("top", [1.0, 1e2, 1e4])
def test_float32_errs_as_documented(tail: str, top: float) -> None:
    estimate = make(64, 8, tail, top, seed=2)
    damping = 1.0
    got = invert_low_rank(estimate.to(torch.float32), torch.tensor(damping))
    assert got.W_dr.dtype == torch.float32
    wanted = torch.linalg.inv(damped(estimate, damping))
    X = torch.randn(64, 3, generator=generator(0))
    applied = apply_left(got, X)
    assert relative_error(applied, wanted @ X.double()) < 1e-6
    top_direction = estimate.U_dr[:, :1].float()
    error = relative_error(apply_left(got, top_direction), wanted @ top_direction.double())
    assert error < 1e-6 * max(1.0, top)  # 1e-2 at lam/D = 1e4


@pytest.mark.parametrize("tail", TAILS)
def test_floor_bounds_the_condition(tail: str) -> None:
    estimate = make(10, 3, tail, 1e8, seed=3)
    if tail == "diagonal":
        estimate = estimate._replace(tail=torch.zeros(10, dtype=torch.float64))
    got = invert_low_rank(estimate, torch.tensor(1e-9, dtype=torch.float64))
    assert got.inv_diag.max().item() <= 1 / (FLOOR * 1e8) * (1 + 1e-12)
    eigenvalues = torch.linalg.eigvalsh(got.dense())
    assert eigenvalues.min().item() > 0


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("scale", [1e-24, 1e-12, 1.0, 1e8, 1e16])
def test_scale_does_not_matter_in_float32(tail: str, scale: float) -> None:
    base = make(9, 4, tail, 10.0, seed=4)
    estimate = Estimate(
        base.U_dr,
        base.lam_r * scale,
        None if base.tail is None else base.tail * scale,
        base.trace * scale,
    ).to(torch.float32)
    got = invert_low_rank(estimate, torch.tensor(0.1 * scale, dtype=torch.float64))
    wanted = torch.linalg.inv(damped(base, 0.1))
    assert relative_error(got.dense().double() * scale, wanted) < 1e-5


@pytest.mark.parametrize("tail", TAILS)
def test_zero_factor_without_damping_is_the_identity(tail: str) -> None:
    base = make(6, 2, tail, 1.0, seed=5)
    nothing = Estimate(
        base.U_dr,
        torch.zeros(2),
        None if base.tail is None else torch.zeros_like(base.tail),
        torch.zeros(()),
    ).to(torch.float32)
    got = invert_low_rank(nothing, torch.tensor(0.0))
    assert torch.equal(got.dense(), torch.eye(6))


@pytest.mark.parametrize("tail_A", TAILS)
@pytest.mark.parametrize("tail_G", TAILS)
def test_apply_equals_the_kronecker_inverse(tail_A: str, tail_G: str) -> None:
    A, G = make(7, 3, tail_A, 5.0, seed=6), make(5, 5, tail_G, 3.0, seed=7)
    grad = torch.randn(5, 7, generator=generator(1), dtype=torch.float64)
    delta_A, delta_G = torch.tensor(0.2), torch.tensor(0.4)
    got = apply_sides(invert_low_rank(G, delta_G), invert_low_rank(A, delta_A), grad)
    wanted = kronecker_solve(damped(A, delta_A.double()), damped(G, delta_G.double()), grad)
    assert relative_error(got, wanted) < 1e-12


def test_dense_sides_apply_alike_and_mix() -> None:
    A, G = psd([3.0, 2.0, 1.0], 0), psd([5.0, 1.0], 1)
    grad = torch.randn(2, 3, generator=generator(2), dtype=torch.float64)
    dense_A, dense_G = DenseInverse(torch.linalg.inv(A)), DenseInverse(torch.linalg.inv(G))
    assert relative_error(apply_sides(dense_G, dense_A, grad), kronecker_solve(A, G, grad)) < 1e-13
    lam, U = torch.linalg.eigh(G)
    delta = torch.tensor(1e-3, dtype=torch.float64)
    low = invert_low_rank(Estimate(U, lam, None, lam.sum()), delta)
    mixed = apply_sides(low, dense_A, grad)
    G_damped = G + 1e-3 * torch.eye(2, dtype=torch.float64)
    assert relative_error(mixed, kronecker_solve(A, G_damped, grad)) < 1e-11


@pytest.mark.parametrize("tail", TAILS)
def test_batched_equals_looped(tail: str) -> None:
    estimates = [make(8, 3, tail, 4.0, seed) for seed in range(3)]
    columns = list(zip(*estimates, strict=True))
    stacked = Estimate(
        torch.stack(columns[0]),
        torch.stack(columns[1]),
        None if tail == "none" else torch.stack(columns[2]),
        torch.stack(columns[3]),
    )
    damping = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    X = torch.randn(3, 5, 8, generator=generator(3), dtype=torch.float64)
    got = apply_right(invert_low_rank(stacked, damping), X)
    for i in range(3):
        one = apply_right(invert_low_rank(estimates[i], damping[i]), X[i])
        assert relative_error(got[i], one) < 1e-14


def test_nothing_of_size_d_squared_is_made() -> None:
    # d² would be 40 GB here.
    d = 100_000
    U = torch.zeros(d, 1)
    U[0] = 1.0
    estimate = Estimate(U, torch.tensor([2.0]), torch.full((d,), 0.5), torch.tensor(2.0 + 0.5 * d))
    inverse = invert_low_rank(estimate, torch.tensor(0.5))
    assert isinstance(inverse, LowRankInverse)
    X = torch.ones(1, d)
    got = apply_right(inverse, X)
    assert got[0, 0].item() == pytest.approx(1 / 3, abs=1e-6)
    assert got[0, 1].item() == pytest.approx(1.0, abs=1e-6)
