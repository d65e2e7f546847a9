"""Roots against matrix powers by eigenvalues in float64, and tensors dimension by dimension."""

from __future__ import annotations

import pytest
import torch
from oracles import generator, low_rank_matrix, orthonormal, psd, relative_error

from distcurv.curvature.estimate import Estimate
from distcurv.curvature.inverse import DenseInverse
from distcurv.curvature.modes import apply_modes, encode_modes
from distcurv.curvature.roots import inverse_root, root_low_rank
from distcurv.curvature.spec import BlockSpec, SideSpec
from distcurv.errors import NumericsError, ShapeError

SPECTRUM = [100.0, 3.0, 0.5, 1e-3, 0.0]


def power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    lam, U = torch.linalg.eigh(matrix)
    return U @ torch.diag(lam**exponent) @ U.mT


@pytest.mark.parametrize("p", [1 / 6, 0.25, 0.5, 1.0])
def test_a_root_raised_again_is_the_inverse(p: float) -> None:
    matrix, damping = psd(SPECTRUM, 0), torch.tensor(1e-2, dtype=torch.float64)
    root = inverse_root(matrix, damping, p)
    damped = matrix + damping * torch.eye(5, dtype=torch.float64)
    assert relative_error(power(root, 1 / p) @ damped, torch.eye(5, dtype=torch.float64)) < 1e-10
    batch = inverse_root(matrix.expand(2, 5, 5), damping.expand(2), p)
    assert relative_error(batch[1], root) < 1e-12


@pytest.mark.parametrize(
    ("matrix", "damping", "told"),
    [
        (torch.full((3, 3), float("nan")), 1.0, "NaN"),
        (-torch.eye(3), 1.0, "negative"),
        (torch.zeros(3, 3), 0.0, "not damped"),
    ],
)
def test_what_has_no_root_is_refused(matrix: torch.Tensor, damping: float, told: str) -> None:
    with pytest.raises(NumericsError, match=told):
        inverse_root(matrix, torch.tensor(damping), 0.25)


@pytest.mark.parametrize("tail", [None, 0.2])
@pytest.mark.parametrize(("d", "r"), [(6, 2), (4, 4), (1, 1)])
def test_a_low_rank_root_is_that_of_the_dense_matrix(d: int, r: int, tail: float | None) -> None:
    U = orthonormal(d, r, seed=1)
    lam = torch.tensor([50.0, 2.0, 1.0, 0.5][:r], dtype=torch.float64)
    t = None if tail is None else torch.tensor([0.0 if d == r else tail], dtype=torch.float64)
    damping = torch.tensor(1e-2, dtype=torch.float64)
    matrix = low_rank_matrix(U, lam, t) if d > 1 else lam.view(1, 1)
    root = root_low_rank(Estimate(U, lam, t, matrix.trace()), damping, 0.25)
    assert (
        relative_error(
            root.dense(), power(matrix + damping * torch.eye(d, dtype=torch.float64), -0.25)
        )
        < 1e-12
    )


def test_each_dimension_has_its_statistic_and_its_matrix() -> None:
    X = torch.randn(3, 4, 2, generator=generator(0))
    sides = tuple(SideSpec(d, d, "none", "dense") for d in X.shape)
    spec = BlockSpec("w", "shampoo", sides, 0.9)
    statistic = encode_modes(spec, X, {})
    wanted = torch.einsum("abc,adc->bd", X, X)
    assert torch.allclose(statistic["M1.packed"], wanted[torch.triu_indices(4, 4).unbind()])
    matrices = [torch.randn(d, d, generator=generator(d)) for d in X.shape]
    made = apply_modes([DenseInverse(m) for m in matrices], X)
    assert torch.allclose(made, torch.einsum("abc,xa,yb,zc->xyz", X, *matrices), atol=1e-5)
    bad = encode_modes(spec, torch.where(X.max() == X, torch.inf, X), {})
    assert all(not value.any() for value in bad.values())
    with pytest.raises(ShapeError, match="one side for each dimension"):
        encode_modes(spec, X[:, :, 0], {})
