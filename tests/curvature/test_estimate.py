"""How the tail completes an estimate: exact in the trace or the diagonal, never negative."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import generator, low_rank_matrix, orthonormal, psd, relative_error

from distcurv.curvature.estimate import Estimate, complete
from distcurv.errors import NumericsError


def level_by_bisection(lam: torch.Tensor, trace: float, d: int) -> float:
    """t with Σ max(lam, t) + (d − r) t = trace."""
    low, high = 0.0, trace
    for _ in range(200):
        t = (low + high) / 2
        if lam.clamp(min=t).sum().item() + (d - len(lam)) * t < trace:
            low = t
        else:
            high = t
    return (low + high) / 2


@given(
    r=st.integers(1, 6),
    extra=st.integers(1, 6),
    missing=st.floats(0, 50),
    seed=st.integers(0, 1000),
)
def test_isotropic_level_is_the_water_level(r: int, extra: int, missing: float, seed: int) -> None:
    d = r + extra
    U = orthonormal(d, r, seed)
    lam = torch.rand(r, generator=generator(seed), dtype=torch.float64).sort(descending=True).values
    trace = lam.sum() + missing
    got = complete(U, lam, "isotropic", trace, None)
    assert got.tail is not None
    level = level_by_bisection(lam, trace.item(), d)
    assert got.tail.item() == pytest.approx(level, abs=1e-9)
    assert relative_error(got.lam_r, lam.clamp(min=level)) < 1e-9
    assert got.dense().trace().item() == pytest.approx(trace.item(), rel=1e-12)
    assert bool((got.lam_r >= got.tail).all())


def test_full_rank_has_no_isotropic_tail() -> None:
    lam = torch.tensor([2.0, 1.0], dtype=torch.float64)
    got = complete(torch.eye(2, dtype=torch.float64), lam, "isotropic", lam.sum() * 1.0001, None)
    assert got.tail is not None
    assert got.tail.tolist() == [0.0]
    assert got.lam_r.tolist() == [2.0, 1.0]


def test_diagonal_tail_is_exact_in_the_diagonal() -> None:
    A = psd([0.6**i for i in range(9)], seed=0)
    lam, U = torch.linalg.eigh(A)
    got = complete(U[:, -3:].flip(1), lam[-3:].flip(0), "diagonal", A.trace(), A.diagonal())
    assert relative_error(got.dense().diagonal(), A.diagonal()) < 1e-14
    assert got.tail is not None
    assert bool((got.tail >= 0).all())


def test_rounding_is_clamped_and_more_is_refused() -> None:
    U, lam = torch.eye(4)[:, :1], torch.ones(1)
    diag = torch.tensor([1.0 - 1e-6, 0.5, 0.0, 0.0])
    got = complete(U, lam, "diagonal", diag.sum(), diag)
    assert got.tail is not None
    assert got.tail.tolist() == [0.0, 0.5, 0.0, 0.0]
    with pytest.raises(NumericsError, match="diagonal tail is negative"):
        complete(U, lam, "diagonal", torch.tensor(1.4), torch.tensor([0.9, 0.5, 0.0, 0.0]))
    with pytest.raises(NumericsError, match="leaves of the trace is negative"):
        complete(U, lam, "none", torch.tensor(0.9), None)
    with pytest.raises(NumericsError, match="isotropic tail is negative"):
        complete(U, lam, "isotropic", torch.tensor(0.9), None)


@pytest.mark.parametrize("tail", ["none", "isotropic", "diagonal"])
def test_dense_and_times_agree_with_the_formula(tail: str) -> None:
    U = orthonormal(7, 3, seed=1)
    lam = torch.tensor([3.0, 2.0, 1.5], dtype=torch.float64)
    value = {
        "none": None,
        "isotropic": torch.tensor([0.5], dtype=torch.float64),
        "diagonal": torch.rand(7, generator=generator(2), dtype=torch.float64),
    }[tail]
    estimate = Estimate(U, lam, value, torch.tensor(1.0, dtype=torch.float64))
    wanted = low_rank_matrix(U, lam, value)
    X = torch.randn(7, 4, generator=generator(3), dtype=torch.float64)
    assert relative_error(estimate.dense(), wanted) < 1e-15
    assert relative_error(estimate.times(X), wanted @ X) < 1e-15
