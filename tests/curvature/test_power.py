"""Block power iteration against the exact eigenbasis."""

from __future__ import annotations

import pytest
import torch
from oracles import best_rank, orthogonality_error, orthonormal, psd, relative_error

from distcurv.curvature.power import power_eigenpairs, power_pass
from distcurv.errors import NumericsError


def rebuilt(U: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    return (U.double() * lam.double().unsqueeze(-2)) @ U.double().mT


def test_repeated_refreshes_converge_to_the_best_rank() -> None:
    A = psd([0.3**i for i in range(20)], seed=0)
    Q = orthonormal(20, 5, seed=1)
    errors = []
    for _ in range(12):
        Q, lam = power_eigenpairs(A, Q)
        errors.append(relative_error(rebuilt(Q, lam), best_rank(A, 5)))
    assert errors[0] > errors[3] > errors[11]
    assert errors[11] < 1e-6


def test_more_passes_equal_more_calls() -> None:
    A = psd([0.8**i for i in range(15)], seed=2)
    Q = orthonormal(15, 4, seed=3)
    U, lam = power_eigenpairs(A, Q, passes=3)
    U2, lam2 = power_eigenpairs(A, power_pass(A, power_pass(A, Q)))
    assert relative_error(rebuilt(U, lam), rebuilt(U2, lam2)) < 1e-12


def test_passes_per_batch_entry() -> None:
    A = torch.stack([psd([0.8**i for i in range(15)], seed=s) for s in (4, 5)])
    Q = orthonormal(15, 4, seed=6, batch=(2,))
    U, lam = power_eigenpairs(A, Q, passes=torch.tensor([1, 2]))
    for i, passes in enumerate((1, 2)):
        one = power_eigenpairs(A[i], Q[i], passes)
        assert relative_error(rebuilt(U[i], lam[i]), rebuilt(*one)) < 1e-13


def test_a_tolerance_ends_the_passes_entry_by_entry() -> None:
    """The first stands after some passes, the second, whose spectrum is nearly flat, does not."""
    A = torch.stack([psd([ratio**i for i in range(15)], seed=4) for ratio in (0.3, 0.95)])
    Q = orthonormal(15, 4, seed=6, batch=(2,))
    tolerance = 1e-3
    got = power_eigenpairs(A, Q, passes=12, tolerance=tolerance)
    expected = []
    for M, start in zip(A, Q, strict=True):
        passes = 1
        while passes < 12:
            after = power_pass(M, start)
            moved = (after - start @ (start.mT @ after)).norm()
            start, passes = after, passes + 1
            if moved < tolerance:
                break
        expected.append((passes, rebuilt(*power_eigenpairs(M, start))))
    assert 2 < expected[0][0] < 12 == expected[1][0]
    for i, (_, wanted) in enumerate(expected):
        assert relative_error(rebuilt(got.U_dr[i], got.lam_r[i]), wanted) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_rank_is_the_exact_eigenbasis(dtype: torch.dtype) -> None:
    A = psd([3.0, 3.0, 1.0, 1e-3, 0.0], seed=7)
    U, lam = power_eigenpairs(A, orthonormal(5, 5, seed=8).to(dtype))
    assert U.dtype == dtype
    assert relative_error(rebuilt(U, lam), A) < (1e-6 if dtype == torch.float32 else 1e-14)
    assert lam.tolist() == pytest.approx([3.0, 3.0, 1.0, 1e-3, 0.0], abs=1e-12)


@pytest.mark.parametrize("r", [1, 3, 6])
def test_zero_and_rank_deficient(r: int) -> None:
    Q = orthonormal(6, r, seed=9).float()
    U, lam = power_eigenpairs(torch.zeros(6, 6), Q, passes=2)
    assert lam.abs().max().item() == 0.0
    assert orthogonality_error(U) < 1e-6
    A = psd([1.0, 0, 0, 0, 0, 0], seed=10)
    U, lam = power_eigenpairs(A.float(), Q, passes=2)
    assert relative_error(rebuilt(U, lam), A) < 1e-5
    assert orthogonality_error(U) < 1e-6


@pytest.mark.parametrize("r", [2, 4])
def test_bad_matrices_are_refused(r: int) -> None:
    Q = orthonormal(4, r, seed=11)
    with pytest.raises(NumericsError):
        power_eigenpairs(torch.full((4, 4), float("inf")), Q)
    with pytest.raises(NumericsError):
        power_eigenpairs(-torch.eye(4), Q)
