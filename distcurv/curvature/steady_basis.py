"""A new basis of the same space that continues the old one: one step of orthogonal iteration.

Why this file exists: eigenvectors of close eigenvalues turn freely between two versions, although
the space that they span hardly moves. Second moments that are turned along are averaged over each
such pair for nothing. SOAP does not meet this: its basis is the QR factor of (factor · old basis),
which keeps its columns where the eigenvalues do not separate them, and reaches the eigenvectors
where they do. Restricted to the span of the new eigenvectors U that factor is U Q with
Λ Uᵀ V = Q R: a QR of r×r numbers and one thin product.

Source: Vyas et al. 2024, "SOAP: Improving and Stabilizing Shampoo using Adam", Algorithm 4.

Shape suffixes: d dimension, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distcurv.errors import ShapeError

# Directions without an eigenvalue of their own keep the order of the old basis.
_SMALLEST = 1e-6


def steady_rotation(U_dr: Tensor, lam_r: Tensor, old_dr: Tensor) -> Tensor:
    """The rotation Q [r, r] for which U Q continues the old basis.

    Args:
        U_dr: the new eigenvectors, orthonormal columns, float32 or float64.
        lam_r: their eigenvalues ≥ 0; all zero counts as all equal.
        old_dr: the basis in use, orthonormal columns.

    Raises:
        ShapeError: the shapes do not fit together.
    """
    if U_dr.shape != old_dr.shape or lam_r.shape != U_dr.shape[-1:]:
        raise ShapeError(
            f"steady_rotation got U of shape {tuple(U_dr.shape)}, {tuple(lam_r.shape)} eigenvalues "
            f"and an old basis of shape {tuple(old_dr.shape)}: give [d, r], [r] and [d, r]"
        )
    largest = lam_r.amax()
    weights_r = torch.where(largest > 0, lam_r / largest, 1.0).clamp_min_(_SMALLEST)
    Q_rr, R_rr = torch.linalg.qr(weights_r[:, None] * (U_dr.mT @ old_dr))
    # A column continues the old one in its sign too.
    signs_r = torch.where(R_rr.diagonal() < 0, -1.0, 1.0).to(Q_rr)
    rotation_rr: Tensor = Q_rr * signs_r
    return rotation_rr
