"""Frames: vectors with orthonormal coordinates are orthonormal, and Y is where it is said to be.

Tolerances: 1e-12 in float64; in float32 1e-6 for orthogonality and 1e-5 for Y. A U that is off by
x is put right to x².
"""

from __future__ import annotations

import pytest
import torch
from oracles import generator, orthogonality_error, orthonormal, relative_error

from distcurv.curvature.frame import frame_with

D, R = 40, 6


def usual(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    U = orthonormal(D, R, seed=1, batch=(2,)).to(dtype)
    Y = torch.randn(2, D, R, generator=generator(2), dtype=torch.float64)
    return U, (U.double() @ (U.double().mT @ Y) * 30 + Y).to(dtype)


def nothing_new(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    U = orthonormal(D, R, seed=1, batch=(2,)).to(dtype)
    mixing = torch.randn(2, R, R, generator=generator(3), dtype=torch.float64)
    return U, (U.double() @ mixing).to(dtype)


def little_new(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    U, Y = nothing_new(dtype)
    one = torch.randn(2, D, 1, generator=generator(4), dtype=torch.float64).to(dtype)
    return U, Y + one * torch.linspace(0.1, 0.2, R, dtype=dtype)  # one direction in all columns


def ill_conditioned(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    U, Y = usual(dtype)
    mixing = torch.eye(R, dtype=torch.float64) + 1.0  # columns that nearly agree
    return U, (Y.double() @ mixing * 0.03 ** torch.arange(R)).to(dtype)


def zero(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    U, _ = usual(dtype)
    return U, torch.zeros_like(U)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", [usual, nothing_new, little_new, ill_conditioned, zero])
def test_coordinates_are_orthonormal_and_hold_Y(case, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    U, Y = case(dtype)
    frame, Y_in_frame = frame_with(U, Y)
    X = orthonormal(2 * R, 2 * R, seed=5, batch=(2,))
    vectors = frame.vectors(X)
    assert vectors.dtype == dtype
    tolerance = (1e-6, 1e-5) if dtype == torch.float32 else (1e-12, 1e-12)
    for i in range(2):
        assert orthogonality_error(vectors[i]) < tolerance[0]
    assert relative_error(frame.vectors(Y_in_frame), Y) < tolerance[1]
    assert relative_error(vectors @ (X.mT @ Y_in_frame).to(dtype), Y) < tolerance[1]


def test_only_what_is_well_conditioned_goes_without_a_qr() -> None:
    assert frame_with(*usual(torch.float32))[0].chol_Brr is not None
    for case in (nothing_new, little_new, ill_conditioned, zero):
        assert frame_with(*case(torch.float32))[0].chol_Brr is None


@pytest.mark.parametrize("case", [usual, little_new])
def test_an_error_in_the_basis_is_squared(case) -> None:  # type: ignore[no-untyped-def]
    U, Y = case(torch.float64)
    noise = torch.randn(U.shape, generator=generator(6), dtype=torch.float64)
    frame, _ = frame_with(U + 1e-5 * noise, Y)
    vectors = frame.vectors(torch.eye(2 * R, dtype=torch.float64).expand(2, -1, -1))
    for i in range(2):
        assert orthogonality_error(vectors[i]) < 1e-8
