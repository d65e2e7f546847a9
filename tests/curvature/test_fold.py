"""The fold against the dense weighted sum.

Tolerances: 1e-12 in float64. In float32 the bases carry 1e-7 each, so 1e-5 on matrices.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import (
    best_rank,
    generator,
    low_rank_matrix,
    orthogonality_error,
    orthonormal,
    relative_error,
)

from distcurv.curvature.estimate import Estimate
from distcurv.curvature.fold import fold
from distcurv.errors import NumericsError, ShapeError

TAILS = ["none", "isotropic", "diagonal"]


def random_estimate(d: int, r: int, tail: str, seed: int, zeros: int = 0) -> Estimate:
    """A valid estimate in float64, with ``zeros`` eigenvalues at the tail's level."""
    U = orthonormal(d, r, seed)
    lam = torch.rand(r, generator=generator(seed), dtype=torch.float64).sort(descending=True).values
    level = 0.0
    value: torch.Tensor | None = None
    if tail == "isotropic":
        level = 0.0 if r == d else 0.3
        value = torch.tensor([level], dtype=torch.float64)
    if tail == "diagonal":
        value = torch.rand(d, generator=generator(seed + 1), dtype=torch.float64)
        if r == d:
            value = torch.zeros(d, dtype=torch.float64)
    lam = lam + level
    lam[r - zeros :] = level
    return Estimate(U, lam, value, low_rank_matrix(U, lam, value).trace())


def matrix_of(estimate: Estimate) -> torch.Tensor:
    return low_rank_matrix(estimate.U_dr, estimate.lam_r, estimate.tail)


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("d", [1, 2, 11])
def test_full_rank_equals_the_average(
    d: int, dtype: torch.dtype, tolerance: float, tail: str
) -> None:
    one, two = random_estimate(d, d, tail, 1), random_estimate(d, d, tail, 2)
    got = fold(one.to(dtype), two.to(dtype), number(0.7), number(0.3))
    assert relative_error(matrix_of(got), 0.7 * matrix_of(one) + 0.3 * matrix_of(two)) < tolerance
    assert orthogonality_error(got.U_dr) < 2e-6
    assert got.U_dr.dtype == dtype


@given(
    tail=st.sampled_from(TAILS),
    d=st.integers(1, 14),
    rank_share=st.floats(0.05, 1.0),
    a=st.floats(0, 1),
    zeros=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_any_rank_conserves_trace_and_diagonal(
    tail: str, d: int, rank_share: float, a: float, zeros: int, seed: int
) -> None:
    r = max(1, round(rank_share * d))
    one = random_estimate(d, r, tail, seed)
    two = random_estimate(d, r, tail, seed + 50, zeros=min(zeros, r))
    got = fold(one, two, number(a), number(1 - a))
    wanted = a * matrix_of(one) + (1 - a) * matrix_of(two)
    assert bool((got.lam_r >= -1e-15).all())
    assert bool((got.lam_r[:-1] >= got.lam_r[1:]).all())
    assert orthogonality_error(got.U_dr) < 1e-12
    assert got.trace.item() == pytest.approx(wanted.trace().item(), rel=1e-12)
    if tail == "none":
        assert relative_error(matrix_of(got), best_rank(wanted, r)) < 1e-6
        return
    assert got.tail is not None
    assert matrix_of(got).trace().item() == pytest.approx(wanted.trace().item(), rel=1e-12)
    assert bool((got.tail >= 0).all())
    if tail == "isotropic":
        assert bool((got.lam_r >= got.tail - 1e-14).all())
    else:
        assert relative_error(matrix_of(got).diagonal(), wanted.diagonal()) < 1e-12


def test_isotropic_keeps_the_leading_eigenpairs_exactly() -> None:
    # The sum has rank 3 over its flat part, so nothing is cut and the fold is exact.
    U = orthonormal(9, 3, seed=0)
    one = Estimate(U, torch.tensor([4.0, 3.0, 1.0]), torch.tensor([1.0]), torch.tensor(14.0))
    turned = U[:, [1, 2, 0]]
    two = Estimate(turned, torch.tensor([6.0, 2.5, 2.0]), torch.tensor([0.5]), number(13.5))
    one, two = one.double(), two.double()
    got = fold(one, two, number(0.25), number(0.75))
    assert relative_error(matrix_of(got), 0.25 * matrix_of(one) + 0.75 * matrix_of(two)) < 1e-14


def test_directions_without_weight_stay_in_the_span() -> None:
    # The second estimate knows one direction; the other columns must not become unit vectors of
    # the QR, or the next sketch could never find anything there.
    U1, U2 = orthonormal(40, 4, seed=1), orthonormal(40, 4, seed=2)
    zero = torch.zeros(4, dtype=torch.float64)
    one = Estimate(U1, zero, None, number(0.0))
    two = Estimate(U2, zero + torch.tensor([1.0, 0, 0, 0]), None, number(1.0))
    got = fold(one, two, number(0.0), number(1.0))
    span = torch.linalg.qr(torch.cat([U1, U2], -1)).Q
    assert (got.U_dr - span @ (span.mT @ got.U_dr)).norm().item() < 1e-12
    assert got.lam_r.tolist() == pytest.approx([1.0, 0, 0, 0], abs=1e-14)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("scale", [1e-24, 1e-12, 1e8, 1e16])
def test_scale_does_not_matter(tail: str, scale: float) -> None:
    one, two = random_estimate(8, 3, tail, 3), random_estimate(8, 3, tail, 4)

    def scaled(e: Estimate) -> Estimate:
        return Estimate(
            e.U_dr, e.lam_r * scale, None if e.tail is None else e.tail * scale, e.trace * scale
        ).to(torch.float32)

    got = fold(scaled(one), scaled(two), number(0.5), number(0.5))
    wanted = matrix_of(fold(one, two, number(0.5), number(0.5)))
    assert relative_error(matrix_of(got) / scale, wanted) < 1e-5


@pytest.mark.parametrize("tail", TAILS)
def test_zero_estimates_fold_to_zero(tail: str) -> None:
    one = random_estimate(6, 2, tail, 0)
    nothing = Estimate(
        one.U_dr,
        torch.zeros_like(one.lam_r),
        None if one.tail is None else torch.zeros_like(one.tail),
        number(0.0),
    )
    got = fold(nothing, nothing, number(0.5), number(0.5))
    assert matrix_of(got).abs().max().item() == 0.0
    assert orthogonality_error(got.U_dr) < 1e-12


@pytest.mark.parametrize("tail", TAILS)
def test_batched_equals_looped(tail: str) -> None:
    ones = [random_estimate(10, 4, tail, s) for s in range(3)]
    twos = [random_estimate(10, 4, tail, s) for s in range(10, 13)]

    def stacked(estimates: list[Estimate]) -> Estimate:
        columns = list(zip(*estimates, strict=True))
        return Estimate(
            torch.stack(columns[0]),
            torch.stack(columns[1]),
            None if tail == "none" else torch.stack(columns[2]),
            torch.stack(columns[3]),
        )

    a = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    got = fold(stacked(ones), stacked(twos), a, 1 - a)
    for i in range(3):
        one = fold(ones[i], twos[i], a[i], 1 - a[i])
        mine = Estimate(
            got.U_dr[i],
            got.lam_r[i],
            None if got.tail is None else got.tail[i],
            got.trace[i],
        )
        assert relative_error(matrix_of(mine), matrix_of(one)) < 1e-13


def test_bad_input_is_refused() -> None:
    one, two = random_estimate(6, 2, "isotropic", 0), random_estimate(6, 2, "diagonal", 1)
    with pytest.raises(ShapeError, match="same kind of tail"):
        fold(one, two, number(0.5), number(0.5))
    with pytest.raises(NumericsError, match="SVD"):
        bad = one._replace(lam_r=torch.full_like(one.lam_r, float("nan")))
        fold(one, bad, number(0.5), number(0.5))
    with pytest.raises(NumericsError, match="is negative"):
        fold(one, one._replace(lam_r=one.lam_r - 1.5), number(0.5), number(0.5))
