"""Inverses of damped factors, in a form that is applied without ever being densified.

Low rank: (D + U diag(w) Uᵀ)⁻¹ = D⁻¹ − W Wᵀ, two thin products to apply. Diagonal: the same without
W. Dense: the matrix itself.

In float32 a direction of eigenvalue w over a floor D comes out as the small difference of two
numbers of size 1/D, which loses a share of about eps · w/D: D is therefore kept at `FLOOR` times
the largest eigenvalue or more, in every form alike.

Shape suffixes, after any number of leading batch dimensions: d dimension, r rank, O output
features (side G), I input features (side A).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distcurv.curvature.estimate import Estimate

FLOOR = 1e-4  # float32 errs 2e-3 in the top direction at w/D = 1e4, and 0.1 at 1e6


class LowRankInverse(NamedTuple):
    """D⁻¹ − W Wᵀ."""

    inv_diag: Tensor  # [..., 1] where D is a multiple of I, else [..., d]
    W_dr: Tensor

    def dense(self) -> Tensor:
        """The matrix [..., d, d]."""
        d = self.W_dr.shape[-2]
        inv_d = self.inv_diag.expand(*self.inv_diag.shape[:-1], d)
        return torch.diag_embed(inv_d) - self.W_dr @ self.W_dr.mT


class DenseInverse(NamedTuple):
    """The inverse as a symmetric matrix [..., d, d]."""

    matrix: Tensor

    def dense(self) -> Tensor:
        """The matrix [..., d, d]."""
        return self.matrix


Inverse = LowRankInverse | DenseInverse


def invert_diagonal(diagonal_d: Tensor, damping: Tensor) -> LowRankInverse:
    """(diag(a) + damping · I)⁻¹ with the floor `FLOOR` · max(a): no W, of shape [..., d, 0].

    Args:
        diagonal_d: a [..., d] ≥ 0; the result has its dtype.
        damping: [...] ≥ 0. Where diagonal and damping are all zero the inverse is the identity.
    """
    D_d = diagonal_d.double() + damping.double().unsqueeze(-1)
    D_d = torch.maximum(D_d, FLOOR * diagonal_d.double().amax(-1, keepdim=True))
    inv_d = (1.0 / torch.where(D_d > 0, D_d, 1.0)).to(diagonal_d.dtype)
    return LowRankInverse(inv_d, inv_d.new_empty(*inv_d.shape, 0))


def invert_low_rank(estimate: Estimate, damping: Tensor) -> LowRankInverse:
    """(estimate + damping · I)⁻¹ with the floor `FLOOR`, in the dtype of the estimate.

    With D = D₀ I (isotropic or no tail) the eigenvectors do not turn and W = U √(w/(D₀(D₀ + w))):
    one pass over U in its own dtype. With a diagonal tail, Woodbury: S = √w, K = I + S UᵀD⁻¹U S,
    W = D⁻¹ U S chol(K)⁻ᵀ, which has no 1/w in it. Tensor operations alone, nothing waits for the
    device; products in float64, so that TF32 settings do not reach them.

    Args:
        estimate: a side's factor, [...] batch.
        damping: [...] ≥ 0. Where factor and damping are both zero the inverse is the identity.
    """
    U_dr, lam_r, tail, _ = estimate
    dtype = U_dr.dtype
    estimate = estimate._replace(lam_r=lam_r.double(), tail=None if tail is None else tail.double())
    w_r = estimate.low_rank_weights().clamp(min=0)
    diagonal = damping.double().unsqueeze(-1)
    if estimate.tail is not None:
        diagonal = diagonal + estimate.tail
    diagonal = torch.maximum(diagonal, FLOOR * estimate.lam_r.amax(-1, keepdim=True))
    diagonal = torch.where(diagonal > 0, diagonal, 1.0)
    if not estimate.has_diagonal_tail():
        scale_r = (w_r / (diagonal * (diagonal + w_r))).sqrt().to(dtype)
        return LowRankInverse((1.0 / diagonal).to(dtype), U_dr * scale_r.unsqueeze(-2))
    US_dr = U_dr * w_r.sqrt().unsqueeze(-2)
    DUS_dr = US_dr / diagonal.unsqueeze(-1)
    K_rr = US_dr.mT @ DUS_dr
    K_rr.diagonal(dim1=-2, dim2=-1).add_(1.0)
    # K ≥ I always has a Cholesky factor; the form without a check keeps the device running.
    chol_rr = torch.linalg.cholesky_ex(K_rr).L
    W_dr = torch.linalg.solve_triangular(chol_rr.mT, DUS_dr, upper=True, left=False)
    return LowRankInverse((1.0 / diagonal).to(dtype), W_dr.to(dtype))


def sherman_morrison_inverse(diagonal_d: Tensor, U_dr: Tensor, w_r: Tensor) -> LowRankInverse:
    """(diag(D) + Σ wᵢ uᵢ uᵢᵀ)⁻¹, one rank at a time: the reference for `invert_low_rank`.

    The recursive Sherman–Morrison form of low-rank K-FAC (Osawa and others): with B₀ = D⁻¹ and
    v = Bᵢ₋₁ uᵢ, Bᵢ = Bᵢ₋₁ − wᵢ v vᵀ / (1 + wᵢ uᵢᵀ v). Each rank is one column of W, the same W as
    Woodbury's. O(d r²), r steps in a row; no floor is applied.

    Args:
        diagonal_d: D [..., d] or [..., 1], positive.
        U_dr: [..., d, r].
        w_r: [..., r] ≥ 0.
    """
    inv_diag = 1.0 / diagonal_d
    W_dr = U_dr.new_zeros(*U_dr.shape[:-1], 0)
    for i in range(U_dr.shape[-1]):
        u_d1, w_1 = U_dr[..., i : i + 1], w_r[..., i].unsqueeze(-1).unsqueeze(-1)
        v_d1 = inv_diag.unsqueeze(-1) * u_d1 - W_dr @ (W_dr.mT @ u_d1)
        column_d1 = v_d1 * (w_1 / (1.0 + w_1 * (u_d1.mT @ v_d1))).sqrt()
        W_dr = torch.cat([W_dr, column_d1], -1)
    return LowRankInverse(inv_diag, W_dr)


def apply_left(inverse_G: Inverse, X_OI: Tensor) -> Tensor:
    """G⁻¹ X, [..., O, I]; 4 r O I flops in low-rank form."""
    if isinstance(inverse_G, DenseInverse):
        return inverse_G.matrix @ X_OI
    scaled_OI = inverse_G.inv_diag.unsqueeze(-1) * X_OI
    if inverse_G.W_dr.shape[-1] == 0:
        return scaled_OI
    return scaled_OI - inverse_G.W_dr @ (inverse_G.W_dr.mT @ X_OI)


def apply_right(inverse_A: Inverse, X_OI: Tensor) -> Tensor:
    """X A⁻¹, [..., O, I]; 4 r O I flops in low-rank form."""
    if isinstance(inverse_A, DenseInverse):
        return X_OI @ inverse_A.matrix
    scaled_OI = X_OI * inverse_A.inv_diag.unsqueeze(-2)
    if inverse_A.W_dr.shape[-1] == 0:
        return scaled_OI
    return scaled_OI - (X_OI @ inverse_A.W_dr) @ inverse_A.W_dr.mT


def apply_sides(inverse_G: Inverse, inverse_A: Inverse, grad_OI: Tensor) -> Tensor:
    """The preconditioned gradient P = G⁻¹ ∇W A⁻¹, [..., O, I]; 8 r O I flops, never d³.

    Equals the inverse of A ⊗ G on vec(∇W), columns stacked (Martens and Grosse 2015, section 4.2).
    """
    return apply_right(inverse_A, apply_left(inverse_G, grad_OI))
