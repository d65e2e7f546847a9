"""BFGS on the inverse, and the damping that keeps it positive definite: pure, without branches.

From Goldfarb, Ren and Bahamou 2020, "Practical quasi-Newton methods for training deep neural
networks".  H stands for an inverse Hessian, s for a step, y for the change of the gradient.

Letters: d dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distcurv.errors import ConfigError, NumericsError


class Secant(NamedTuple):
    """What an inverse Hessian should map ``y_d`` to: ``s_d``; both [d]."""

    s_d: Tensor
    y_d: Tensor


def bfgs_inverse(h_dd: Tensor, secant: Secant, valid: Tensor | None = None) -> Tensor:
    """H⁺ = (I − ρ s yᵀ) H (I − ρ y sᵀ) + ρ s sᵀ with ρ = 1 / sᵀy, so that H⁺ y = s.

    H⁺ is symmetric, bit for bit, where H is, and positive definite where H is.  It is H where
    sᵀy <= 0, where it would not be finite, or where ``valid`` (a boolean scalar) says no.
    Nothing waits for the device.
    """
    s_d, y_d = secant
    hy_d = h_dd @ y_d
    sy = s_d @ y_d
    rho = 1 / torch.where(sy > 0, sy, 1.0)
    cross_dd = torch.outer(s_d, hy_d)
    square_dd = torch.outer(s_d, s_d)
    new_dd = h_dd - rho * (cross_dd + cross_dd.mT) + rho * (1 + rho * (y_d @ hy_d)) * square_dd
    good = (sy > 0) & torch.isfinite(new_dd).all()
    if valid is not None:
        good = good & valid
    return torch.where(good, new_dd, h_dd)


def double_damped(h_dd: Tensor, secant: Secant, mu1: float, mu2: float | Tensor) -> Secant:
    """The paper's double damping: Powell's on H, then Levenberg and Marquardt's on its inverse.

    Powell: s̃ = θ s + (1 − θ) H y with the θ <= 1 that gives s̃ᵀy >= μ₁ yᵀHy, so H⁺ stays bounded
    below.  Levenberg-Marquardt: ỹ = y + μ₂ s̃, so s̃ᵀỹ >= μ₂ s̃ᵀs̃ and H⁺ stays bounded above.

    Raises `ConfigError` unless 0 < mu1 < 1.
    """
    if not 0 < mu1 < 1:
        raise ConfigError(f"mu1 is {mu1}: give a number between 0 and 1")
    s_d, y_d = secant
    hy_d = h_dd @ y_d
    yhy, sy = y_d @ hy_d, s_d @ y_d
    short = sy < mu1 * yhy
    theta = torch.where(short, (1 - mu1) * yhy / torch.where(short, yhy - sy, 1.0), 1.0)
    s_d = theta * s_d + (1 - theta) * hy_d
    return Secant(s_d, y_d + mu2 * s_d)


def damped_inverse(a_dd: Tensor, damping: Tensor) -> Tensor:
    """(A + λ I)⁻¹ of a positive semi-definite A, through float64: where the updates begin.

    Raises `NumericsError` where A + λ I is not positive definite; waits for the device."""
    wide_dd = a_dd.double()
    eye_dd = torch.eye(len(a_dd), dtype=wide_dd.dtype, device=a_dd.device)
    chol_dd, info = torch.linalg.cholesky_ex(wide_dd + damping * eye_dd)
    if info != 0 or not torch.isfinite(chol_dd).all():
        raise NumericsError(
            "the matrix plus its damping is not positive definite: if it is finite, give a larger "
            "damping"
        )
    inverse_dd = torch.cholesky_inverse(chol_dd).to(a_dd.dtype)
    return (inverse_dd + inverse_dd.mT) / 2
