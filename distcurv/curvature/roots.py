"""(M + damping · I)⁻ᵖ of a factor M: what Shampoo multiplies each dimension of a gradient with.

Source: Gupta, Koren and Singer 2018, "Shampoo: Preconditioned Stochastic Tensor Optimization",
Algorithm 2; p = 1/(2k) for a tensor of k dimensions. By eigenvalues, in float64.

Shape suffixes, after any number of leading batch dimensions: d dimension, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distcurv.curvature.estimate import Estimate, clamp_rounding
from distcurv.curvature.factorisation import eigh_descending
from distcurv.curvature.inverse import LowRankInverse
from distcurv.errors import NumericsError


def inverse_root(matrix_dd: Tensor, damping: Tensor, power: float) -> Tensor:
    """(M + damping · I)⁻ᵖ in float64, [..., d, d].

    Args:
        matrix_dd: symmetric positive semidefinite but for rounding.
        damping: [...] ≥ 0.
        power: p > 0.

    Raises:
        NumericsError: M is not finite, indefinite beyond rounding, or singular without damping.
    """
    matrix_dd = matrix_dd.double()
    if not bool(torch.isfinite(matrix_dd).all()):
        raise NumericsError("a root was asked of a matrix with NaN or infinite entries")
    U_dd, lam_d = eigh_descending(matrix_dd)
    size = matrix_dd.diagonal(dim1=-2, dim2=-1).abs().sum(-1)
    lam_d = clamp_rounding(lam_d, size, "an eigenvalue of a factor")
    lam_d = lam_d + damping.double().unsqueeze(-1)
    if not bool((lam_d > 0).all()):
        raise NumericsError("a factor is singular and not damped: give a damping above 0")
    return (U_dd * lam_d.pow(-power).unsqueeze(-2)) @ U_dd.mT


def root_low_rank(estimate: Estimate, damping: Tensor, power: float) -> LowRankInverse:
    """(estimate + damping · I)⁻ᵖ = (t + damping)⁻ᵖ I − W Wᵀ, in the dtype of the estimate.

    W = U √((t + damping)⁻ᵖ − (λ + damping)⁻ᵖ): the eigenvectors do not turn. Nothing waits for the
    device.

    Args:
        estimate: with an isotropic tail t or none (t = 0): roots of a diagonal one have no such
            form.
        damping: [...] > 0 where the tail is none or may be 0.
        power: p > 0.
    """
    U_dr, lam_r, tail, _ = estimate
    assert not estimate.has_diagonal_tail() or U_dr.shape[-2] == 1
    outside = damping.double().unsqueeze(-1)
    inside_r = lam_r.double().clamp(min=0) + outside
    if tail is not None:
        outside = outside + tail.double().clamp(min=0)
    outside, inside_r = outside.pow(-power), inside_r.pow(-power)
    scale_r = (outside - inside_r).clamp(min=0).sqrt()
    dtype = U_dr.dtype
    return LowRankInverse(outside.to(dtype), U_dr * scale_r.to(dtype).unsqueeze(-2))
