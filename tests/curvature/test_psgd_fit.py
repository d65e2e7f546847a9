"""PSGD's fit against the dense definition, and against the preconditioner that it must end at."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distcurv.curvature import psgd
from distcurv.curvature.psgd import Factors

DO, DI = 4, 3


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def triangle(n: int, seed: int = 0) -> Tensor:
    """Upper, with a positive diagonal."""
    t = torch.triu(0.3 * rand(n, n, seed=seed))
    return t + torch.diag(1 + rand(n, seed=seed + 50).abs() - t.diagonal())


def dense_factor(q: Tensor) -> Tensor:
    return q.diag() if q.dim() == 1 else q


def whole(factors: Factors) -> Tensor:
    """Q of the matrix's numbers row by row."""
    return torch.kron(dense_factor(factors.left), dense_factor(factors.right))


def pair_value(q: Tensor, dx: Tensor, dg: Tensor) -> Tensor:
    """The criterion, from a dense P."""
    p = q.mT @ q
    return dg @ p @ dg + dx @ torch.linalg.inv(p) @ dx


def hessian(n: int, *, definite: bool = False) -> Tensor:
    """Symmetric, with eigenvalues of either sign unless ``definite``."""
    basis = torch.linalg.qr(rand(n, n, seed=7))[0]
    values = torch.tensor([3.0, -1.5, 0.7, 0.3, -0.4]).double()[:n]
    return basis @ torch.diag(values.abs() if definite else values) @ basis.mT


def root(h: Tensor, damping: float) -> Tensor:
    """(H² + damping²)^(-1/2)"""
    values, basis = torch.linalg.eigh(h)
    return basis @ torch.diag((values**2 + damping**2).rsqrt()) @ basis.mT


def steps(count: int) -> list[float]:
    """Of the fit, smaller and smaller: where all pairs fit one P, it is as near as the last."""
    return torch.logspace(math.log10(0.2), -3, count, dtype=torch.float64).tolist()


def factor_choices() -> list[Factors]:
    dense, diagonal = triangle(DO, 1), triangle(DO, 2).diagonal().clone()
    right, right_diagonal = triangle(DI, 3), triangle(DI, 4).diagonal().clone()
    return [
        Factors(dense, right),
        Factors(diagonal, right),
        Factors(dense, right_diagonal),
        Factors(diagonal, right_diagonal),
    ]


def test_one_step_is_the_papers() -> None:
    q, dx, dg = triangle(5), rand(5, seed=1), rand(5, seed=2)
    a, b = q @ dg, torch.linalg.inv(q).mT @ dx
    change = torch.triu(torch.outer(a, a) - torch.outer(b, b))
    wanted = q - 0.1 / change.abs().max() * change @ q
    got = psgd.fit(q, dx, dg, 0.1)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)
    assert torch.equal(got, torch.triu(got))
    assert (got.diagonal() > 0).all()


def test_the_step_follows_the_relative_gradient() -> None:
    q, dx, dg = triangle(5), rand(5, seed=1), rand(5, seed=2)
    e = torch.zeros(5, 5, dtype=torch.float64, requires_grad=True)
    pair_value((torch.eye(5) + torch.triu(e)) @ q, dx, dg).backward()
    assert e.grad is not None
    wanted = q - 0.1 / e.grad.abs().max() * e.grad @ q
    torch.testing.assert_close(psgd.fit(q, dx, dg, 0.1), wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("choice", range(4))
def test_factors_follow_their_relative_gradients(choice: int) -> None:
    factors = factor_choices()[choice]
    dx, dg = rand(DO, DI, seed=1), rand(DO, DI, seed=2)
    new = psgd.fit_factors(factors, dx, dg, 0.1)
    ratio = (
        dense_factor(factors.left).diagonal().max() / dense_factor(factors.right).diagonal().max()
    ).sqrt()
    balanced = factors.left / ratio, factors.right * ratio
    for side in (0, 1):
        size = len(balanced[side])
        e = torch.zeros(size, size, dtype=torch.float64, requires_grad=True)
        moved = torch.eye(size) + (
            torch.triu(e) if balanced[side].dim() == 2 else e * torch.eye(size)
        )
        parts = [dense_factor(q) for q in balanced]
        parts[side] = moved @ parts[side]
        pair_value(torch.kron(*parts), dx.flatten(), dg.flatten()).backward()
        assert e.grad is not None
        wanted = dense_factor(balanced[side]) - 0.1 / e.grad.abs().max() * e.grad @ dense_factor(
            balanced[side]
        )
        got = dense_factor(new[side])
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("choice", range(4))
def test_applied_and_measured_as_the_kronecker_product(choice: int) -> None:
    factors = factor_choices()[choice]
    dx, dg = rand(DO, DI, seed=1), rand(DO, DI, seed=2)
    q = whole(factors)
    wanted = (q.mT @ q @ dg.flatten()).view(DO, DI)
    torch.testing.assert_close(psgd.apply_factors(factors, dg), wanted, rtol=1e-12, atol=1e-13)
    value = pair_value(q, dx.flatten(), dg.flatten())
    torch.testing.assert_close(psgd.criterion_factors(factors, dx, dg), value, rtol=1e-11, atol=0)


@pytest.mark.parametrize("diagonal", [False, True])
def test_vectors_applied_and_measured(diagonal: bool) -> None:
    q = triangle(5).diagonal().clone() if diagonal else triangle(5)
    dense = dense_factor(q)
    dx, dg = rand(5, seed=1), rand(5, seed=2)
    torch.testing.assert_close(psgd.apply(q, dg), dense.mT @ dense @ dg, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        psgd.criterion(q, dx, dg), pair_value(dense, dx, dg), rtol=1e-11, atol=0
    )


# Of a definite Hessian every single pair fits the P it ends at; else, and with damping, only their
# expectation does, and some noise stays.
EXACT, NOISY = 0.01, 0.08


@pytest.mark.parametrize(
    ("definite", "damping", "limit"), [(True, 0.0, EXACT), (False, 0.0, NOISY), (False, 0.5, NOISY)]
)
def test_ends_at_the_inverse_of_the_absolute_hessian(
    definite: bool, damping: float, limit: float
) -> None:
    n, count = 5, 4000
    h = hessian(n, definite=definite)
    q = torch.eye(n, dtype=torch.float64)
    pairs = rand(count, 2, n, seed=3)
    for (dx, u), step in zip(pairs, steps(count), strict=True):
        q = psgd.fit(q, dx, h @ dx + damping * u, step)
    p, wanted = q.mT @ q, root(h, damping)
    assert (p - wanted).norm() <= limit * wanted.norm()
    # The fitting condition itself: E[P dg dgᵀ P] = E[dx dxᵀ] = I.
    covariance = p @ (h @ h + damping**2 * torch.eye(n)) @ p
    assert (covariance - torch.eye(n)).norm() <= 2 * limit * n**0.5


@pytest.mark.parametrize(("definite", "limit"), [(True, EXACT), (False, NOISY)])
def test_kronecker_fit_ends_at_a_kronecker_inverse(definite: bool, limit: float) -> None:
    left, right = hessian(DO, definite=definite), hessian(DI, definite=definite)
    factors = Factors(torch.eye(DO, dtype=torch.float64), torch.eye(DI, dtype=torch.float64))
    for dx, step in zip(rand(3000, DO, DI, seed=3), steps(3000), strict=True):
        factors = psgd.fit_factors(factors, dx, left @ dx @ right, step)
    q = whole(factors)
    wanted = torch.kron(root(left, 0), root(right, 0))
    assert (q.mT @ q - wanted).norm() <= limit * wanted.norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_changes_nothing(bad: float) -> None:
    q, dx, dg = triangle(5), rand(5, seed=1), rand(5, seed=2)
    dg[2] = bad
    assert torch.equal(psgd.fit(q, dx, dg, 0.1), q)
    factors = factor_choices()[0]
    dg = rand(DO, DI, seed=2)
    dg[1, 1] = bad
    new = psgd.fit_factors(factors, rand(DO, DI, seed=1), dg, 0.1)
    assert all(torch.equal(n, o) for n, o in zip(new, factors, strict=True))


def test_nothing_to_fit_changes_nothing() -> None:
    q, zero = triangle(5), torch.zeros(5, dtype=torch.float64)
    assert torch.equal(psgd.fit(q, zero, zero, 0.1), q)
