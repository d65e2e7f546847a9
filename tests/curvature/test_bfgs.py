"""BFGS on the inverse: secant condition, positive definiteness, and what the damping promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distcurv.curvature.bfgs import Secant, bfgs_inverse, damped_inverse, double_damped
from distcurv.errors import ConfigError, NumericsError

D = 6


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def definite(seed: int = 0) -> Tensor:
    x = rand(D, D, seed=seed)
    product = x @ x.mT
    return (product + product.mT) / 2 + 0.1 * torch.eye(D)


def test_undamped_update_is_the_product_form_and_keeps_the_secant_condition() -> None:
    h, s, g = definite(), rand(D, seed=1), definite(2)
    y = g @ s
    rho = 1 / (s @ y)
    left = torch.eye(D) - rho * torch.outer(s, y)
    wanted = left @ h @ left.mT + rho * torch.outer(s, s)
    new = bfgs_inverse(h, Secant(s, y))
    torch.testing.assert_close(new, wanted, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(new @ y, s, rtol=0, atol=1e-10)
    assert torch.equal(new, new.mT)
    assert torch.linalg.eigvalsh(new)[0] > 0


def test_ends_at_the_inverse_of_a_quadratic() -> None:
    """With conjugate steps D updates are exact (Nocedal and Wright 2006, section 6.4)."""
    g = definite(2)
    h = torch.eye(D, dtype=torch.float64)
    for s in torch.linalg.eigh(g)[1].mT:
        h = bfgs_inverse(h, Secant(s, g @ s))
    torch.testing.assert_close(h @ g, torch.eye(D, dtype=torch.float64), rtol=0, atol=1e-9)


def test_the_factor_of_a_pair_does_not_count() -> None:
    h, s = definite(), rand(D, seed=1)
    y = definite(2) @ s
    wanted = bfgs_inverse(h, Secant(s, y))
    torch.testing.assert_close(bfgs_inverse(h, Secant(7 * s, 7 * y)), wanted, rtol=1e-10, atol=0)


@pytest.mark.parametrize("case", ["negative", "zero", "nan", "inf", "not valid"])
def test_unusable_pairs_change_nothing(case: str) -> None:
    h, s = definite(), rand(D, seed=1)
    y, valid = definite(2) @ s, None
    if case == "negative":
        y = -y
    elif case == "zero":
        s, y = torch.zeros_like(s), torch.zeros_like(y)
    elif case == "not valid":
        valid = torch.tensor(False)
    else:
        y = y.clone()
        y[0] = float(case)
    assert torch.equal(bfgs_inverse(h, Secant(s, y), valid), h)


@pytest.mark.parametrize("seed", range(8))
def test_double_damping_keeps_its_bounds(seed: int) -> None:
    """For pairs of any curvature, also a negative one."""
    mu1, mu2 = 0.2, 0.03
    h = definite(seed)
    s, y = rand(D, seed=seed + 100), rand(D, seed=seed + 200)
    hy = h @ y
    powell = double_damped(h, Secant(s, y), mu1, 0.0)
    assert powell.s_d @ y >= mu1 * (y @ hy) * (1 - 1e-12)
    if s @ y < mu1 * (y @ hy):  # then it is as much as must be
        torch.testing.assert_close(powell.s_d @ y, mu1 * (y @ hy), rtol=1e-10, atol=0)
    else:
        assert torch.equal(powell.s_d, s)
    both = double_damped(h, Secant(s, y), mu1, mu2)
    assert torch.equal(both.s_d, powell.s_d)
    torch.testing.assert_close(both.y_d, y + mu2 * both.s_d, rtol=1e-13, atol=0)
    assert both.s_d @ both.y_d >= mu2 * (both.s_d @ both.s_d) * (1 - 1e-12)
    assert torch.linalg.eigvalsh(bfgs_inverse(h, both))[0] > 0


def test_pairs_of_enough_curvature_are_not_damped_by_powell() -> None:
    h = definite()
    y = rand(D, seed=1)
    s = h @ y
    assert torch.equal(double_damped(h, Secant(s, y), 0.2, 0.0).s_d, s)


def test_stays_definite_and_bounded_over_many_random_pairs() -> None:
    mu2 = 0.1
    h = torch.eye(D, dtype=torch.float64)
    for i in range(500):
        pair = double_damped(h, Secant(rand(D, seed=i), rand(D, seed=1000 + i)), 0.2, mu2)
        h = bfgs_inverse(h, pair)
        torch.testing.assert_close(h @ pair.y_d, pair.s_d, rtol=0, atol=1e-8)
        assert torch.linalg.eigvalsh(h)[0] > 0


def test_mu1_is_checked() -> None:
    for mu1 in (0.0, 1.0):
        with pytest.raises(ConfigError, match="mu1"):
            double_damped(definite(), Secant(rand(D), rand(D)), mu1, 0.1)


def test_damped_inverse() -> None:
    a = rand(D, 2)
    a = a @ a.mT  # singular
    got = damped_inverse(a, torch.tensor(0.3))
    torch.testing.assert_close(
        got @ (a + 0.3 * torch.eye(D)), torch.eye(D, dtype=torch.float64), rtol=0, atol=1e-7
    )
    assert torch.equal(got, got.mT)
    for bad in (-torch.eye(D), torch.full((D, D), float("nan"))):
        with pytest.raises(NumericsError):
            damped_inverse(bad, torch.tensor(0.1))
