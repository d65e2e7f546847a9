"""Power iteration with deflation finds the subspace that the block form finds, and eigh's."""

from __future__ import annotations

import pytest
import torch
from oracles import orthonormal, psd
from torch import Tensor

from distcurv.curvature.deflation import deflated_eigenpairs
from distcurv.curvature.nystrom import nystrom
from distcurv.curvature.power import power_eigenpairs
from distcurv.errors import ConfigError, ShapeError

SPECTRUM = [3.0**-i for i in range(9)]


def between(U: Tensor, V: Tensor) -> float:
    """The sine of the largest angle between two subspaces."""
    U, V = U.double(), V.double()
    return float(torch.linalg.matrix_norm(U - V @ (V.mT @ U), 2))


@pytest.mark.parametrize("rank", [1, 3, 9])
def test_block_form_and_deflation_give_the_same_subspace(rank: int) -> None:
    M = psd(SPECTRUM, seed=1)
    start = orthonormal(9, rank, seed=2)
    U, lam = deflated_eigenpairs(M, start)
    block = power_eigenpairs(M, start, passes=40)
    assert between(U, block.U_dr) < 1e-7
    assert torch.allclose(lam, block.lam_r, rtol=1e-7)
    assert torch.allclose(lam, torch.tensor(SPECTRUM[:rank]).double(), rtol=1e-12)
    exact = torch.linalg.eigh(M).eigenvectors.flip(1)[:, :rank]
    assert between(U, exact) < 1e-7
    assert torch.allclose(U.mT @ U, torch.eye(rank, dtype=torch.float64), atol=1e-12)


def test_a_single_pass_needs_no_iterations_where_the_rank_suffices() -> None:
    """A sketch of a factor of rank 3 is finished exactly at once."""
    M = psd([*SPECTRUM[:3], *[0.0] * 6], seed=3)
    start = orthonormal(9, 3, seed=4)
    U, lam = deflated_eigenpairs(M, start)
    single = nystrom(M @ start, start)
    assert between(U, single.U_dr) < 1e-7
    assert torch.allclose(lam, single.lam_r, rtol=1e-7)


def test_max_itr_and_tolerance_end_it_early() -> None:
    M, start = psd(SPECTRUM, seed=1), orthonormal(9, 1, seed=2)
    exact = torch.linalg.eigh(M).eigenvectors[:, -1:]
    errors = [between(deflated_eigenpairs(M, start, max_itr=n).U_dr, exact) for n in (1, 4, 16)]
    assert errors[0] > errors[1] > errors[2]
    loose = deflated_eigenpairs(M, start, tolerance=0.1).U_dr
    assert 1e-6 < between(loose, exact) < 0.1


def test_a_matrix_without_enough_rank_ends_with_zeros() -> None:
    U, lam = deflated_eigenpairs(psd([1.0, 0.5, 0.0, 0.0], seed=5), orthonormal(4, 3, seed=6))
    assert torch.allclose(lam, torch.tensor([1.0, 0.5, 0.0]).double(), atol=1e-12)
    assert torch.allclose(U.mT @ U, torch.eye(3, dtype=torch.float64), atol=1e-9)


def test_wrong_arguments() -> None:
    M, start = psd([1.0, 0.5], seed=0), orthonormal(2, 1, seed=0)
    with pytest.raises(ConfigError, match="max_itr is 0"):
        deflated_eigenpairs(M, start, max_itr=0)
    with pytest.raises(ConfigError, match="tolerance -1"):
        deflated_eigenpairs(M, start, tolerance=-1)
    with pytest.raises(ShapeError, match="give \\[d, d\\]"):
        deflated_eigenpairs(M, torch.ones(2, 3))
