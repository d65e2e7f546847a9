"""Natural gradients by the samples' kernel equal the dense solve in float64."""

from __future__ import annotations

import pytest
import torch
from oracles import generator

from distcurv.curvature.woodbury import beyond_span, damped_factor, within_span
from distcurv.errors import NumericsError

n, P, DAMPING = 5, 9, 0.03


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    R = torch.randn(n, P, generator=generator(0), dtype=torch.float64)
    return R, R.mT @ R + DAMPING * torch.eye(P, dtype=torch.float64)


def test_a_gradient_in_the_span_of_the_rows() -> None:
    R, damped = problem()
    w = torch.randn(n, generator=generator(1), dtype=torch.float64)
    got = R.mT @ within_span(R @ R.mT, w, DAMPING)
    torch.testing.assert_close(got, torch.linalg.solve(damped, R.mT @ w))


def test_any_gradient() -> None:
    R, damped = problem()
    g = torch.randn(P, generator=generator(2), dtype=torch.float64)
    c = beyond_span(damped_factor(R @ R.mT, DAMPING), R @ g)
    torch.testing.assert_close((g - R.mT @ c) / DAMPING, torch.linalg.solve(damped, g))


def test_repeated_rows_and_float32() -> None:
    R, _ = problem()
    R = torch.cat([R, R]).float()
    c = within_span(R @ R.mT, torch.ones(2 * n), 1e-3)
    assert c.dtype == torch.float64
    wanted = torch.linalg.solve(
        R.mT.double() @ R.double() + 1e-3 * torch.eye(P, dtype=torch.float64), R.double().sum(0)
    )
    torch.testing.assert_close(R.mT.double() @ c, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kernel", [-torch.eye(3), torch.full((3, 3), torch.nan)])
def test_what_is_no_kernel_is_told(kernel: torch.Tensor) -> None:
    with pytest.raises(NumericsError, match="3 samples"):
        damped_factor(kernel, 0.1)
