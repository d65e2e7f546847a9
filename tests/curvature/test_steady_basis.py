"""Bases that continue the ones before: against orthogonal iteration written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distcurv.curvature.steady_basis import steady_rotation
from distcurv.errors import ShapeError

D, R = 12, 4


def orthonormal(rank: int, gen: torch.Generator, d: int = D) -> Tensor:
    return torch.linalg.qr(torch.randn(d, rank, generator=gen, dtype=torch.float64)).Q


def test_it_is_one_step_of_orthogonal_iteration_with_the_factor() -> None:
    gen = torch.Generator().manual_seed(0)
    U, old = orthonormal(R, gen), orthonormal(R, gen)
    lam = torch.tensor([5.0, 2.0, 1.0, 0.3], dtype=torch.float64)
    new = U @ steady_rotation(U, lam, old)
    expected = torch.linalg.qr(U @ lam.diag() @ U.T @ old)
    torch.testing.assert_close(
        new, expected.Q * expected.R.diagonal().sign(), rtol=1e-12, atol=1e-12
    )


def test_the_span_stays_and_columns_are_orthonormal() -> None:
    gen = torch.Generator().manual_seed(1)
    U, old = orthonormal(R, gen), orthonormal(R, gen)
    lam = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    new = U @ steady_rotation(U, lam, old)
    torch.testing.assert_close(new @ new.T, U @ U.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lam", [torch.ones(R), torch.zeros(R)])
def test_equal_eigenvalues_leave_the_basis_where_it_was(lam: Tensor) -> None:
    """The span of the old basis in turned and flipped eigenvectors: no direction may move."""
    gen = torch.Generator().manual_seed(2)
    old = orthonormal(R, gen)
    U = old @ orthonormal(R, gen, R)
    new = U @ steady_rotation(U, lam.double(), old)
    torch.testing.assert_close(new, old, rtol=0, atol=1e-12)


def test_repeated_it_reaches_the_eigenvectors() -> None:
    gen = torch.Generator().manual_seed(3)
    U = orthonormal(R, gen)
    lam = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    basis = U @ orthonormal(R, gen, R)
    for _ in range(40):
        basis = U @ steady_rotation(U, lam, basis)
    torch.testing.assert_close((U.T @ basis).abs(), torch.eye(R).double(), rtol=0, atol=1e-9)


def test_shapes_that_do_not_fit_are_refused() -> None:
    gen = torch.Generator().manual_seed(4)
    with pytest.raises(ShapeError, match="old basis of shape"):
        steady_rotation(orthonormal(R, gen), torch.ones(R), orthonormal(R - 1, gen))
