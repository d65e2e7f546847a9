"""From one sketch Y = AQ to the eigenpairs of A: single-pass Nyström with a shift.

Source: Tropp, Yurtsever, Udell and Cevher 2017, "Fixed-Rank Approximation of a Positive-
Semidefinite Matrix from Streaming Data", Algorithm 3 (the stabilised form of A ≈ Y (QᵀY)⁻¹ Yᵀ).
The singular vectors come from a QR of the tall factor and an SVD of its small R; through a Gram
matrix they would lose their orthogonality.

Precision: the tall QR is float32 (float64 for float64 input); products and everything r x r are
float64, so TF32 settings cannot reach them. Where that fails, once more with a float64 QR and a
larger shift.

A sketch whose numbers were rounded further (`narrow`) errs in each column by a share of that
column: see `outweigh`.

Shape suffixes, after any number of leading batch dimensions: d dimension, r rank.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from distcurv.curvature.factorisation import left_singular
from distcurv.errors import NumericsError, ShapeError

# The shift is √d times the rounding of one number, as a share of ‖Y‖_F. eps of the data, not of
# the arithmetic: what must be outweighed is the rounding of the sums, which a float64 factorisation
# cannot undo.
_RETRY_SHIFT = 100.0
_RETRY_NOISE = 4.0


class Eigenpairs(NamedTuple):
    """U [..., d, r] with orthonormal columns, lam [..., r] ≥ 0 and descending."""

    U_dr: Tensor
    lam_r: Tensor


def nystrom(
    Y_sum_dr: Tensor, Q_dr: Tensor, count: Tensor | float = 1.0, noise: float = 0.0
) -> Eigenpairs:
    """Eigenpairs of the rank-r Nyström approximation of A, given Y_sum = count · A Q.

    The approximation never exceeds A (in the Loewner order, up to the shift), and at r = d equals
    it. A zero Y gives lam = 0 and an orthonormal U near Q.

    Args:
        Y_sum_dr: [..., d, r], summed, float32 or float64.
        Q_dr: [..., d, r], orthonormal columns.
        count: what the sums must be divided by, [...] or one number; entries ≤ 0 count as 1.
        noise: what each number of Y may err by, as a share of it, beyond rounding of its dtype.

    Returns:
        U in the dtype of ``Y_sum_dr``; lam in float64.

    Raises:
        ShapeError: Y and Q differ in shape.
        NumericsError: non-finite input, or a core that is indefinite beyond the retry's shift.
    """
    if Y_sum_dr.shape[-2:] != Q_dr.shape[-2:]:
        raise ShapeError(
            f"nystrom got Y of shape {tuple(Y_sum_dr.shape)} and Q of shape "
            f"{tuple(Q_dr.shape)}: their last two dimensions must be equal"
        )
    Q_dr = Q_dr.expand_as(Y_sum_dr)
    dtype = torch.float64 if Y_sum_dr.dtype == torch.float64 else torch.float32
    Y_dr = Y_sum_dr.double()
    if not bool(torch.isfinite(Y_dr).all() & torch.isfinite(Q_dr).all()):
        raise NumericsError(
            "nystrom got a sketch or a basis with NaN or infinite entries: such statistics must "
            "be dropped before a refresh"
        )
    scale = Y_dr.abs().amax((-2, -1), keepdim=True)
    Y_dr = Y_dr / torch.where(scale > 0, scale, 1.0)
    rounding = math.sqrt(Y_dr.shape[-2]) * torch.finfo(dtype).eps
    rounding += noise**2  # the square of the noise of one column reaches into all others
    U_dr, lam_r, failed = _attempt(Y_dr, Q_dr.double(), dtype, rounding, noise)
    if bool(failed.any()):
        larger, more = _RETRY_SHIFT * rounding, _RETRY_NOISE * noise
        again = _attempt(Y_dr[failed], Q_dr.double()[failed], torch.float64, larger, more)
        if bool(again.failed.any()):
            raise NumericsError(
                f"nystrom: the core QᵀY of {int(again.failed.sum())} block(s) is not positive "
                f"definite even with a shift of {_RETRY_SHIFT:.0f} roundings of Y in float64: Y is "
                f"not A Q for one positive semidefinite A and an orthonormal Q"
            )
        U_dr[failed], lam_r[failed] = again.U_dr, again.lam_r
    divisor = torch.as_tensor(count, dtype=torch.float64, device=Y_dr.device)
    divisor = torch.where(divisor > 0, divisor, 1.0).unsqueeze(-1)
    return Eigenpairs(U_dr.to(dtype), lam_r * scale.squeeze(-1) / divisor)


def outweigh(core_rr: Tensor, Y_dr: Tensor, noise: float) -> Tensor:
    """(QᵀY + noise · diag ‖y‖)/(1 + noise): a core with room for what the columns y of Y err by.

    It stays positive definite, and no direction that is all noise is divided by next to nothing.
    Near the eigenvectors columns are graded, so a shift that outweighs the noise of the largest
    would hide small eigenvalues. This leaves the span of Y as it is and, there, the diagonal too;
    elsewhere the estimate may exceed A by the share ``noise``. Of two numbers that stand for one,
    the product with the smaller column errs by less: it is taken for both.

    Args:
        core_rr: [..., r, r].
        Y_dr: [..., any, r], in any orthonormal coordinates.

    Returns:
        A symmetric matrix.
    """
    size_r = torch.linalg.vector_norm(Y_dr, dim=-2)
    smaller_rr = size_r.unsqueeze(-2) <= size_r.unsqueeze(-1)
    whole_rr = torch.where(smaller_rr, core_rr, core_rr.mT)
    return ((whole_rr + whole_rr.mT) / 2 + torch.diag_embed(noise * size_r)) / (1.0 + noise)


class _Attempt(NamedTuple):
    U_dr: Tensor  # float64 holding the precision of the QR
    lam_r: Tensor
    failed: Tensor  # [...] bool


def _attempt(
    Y_dr: Tensor, Q_dr: Tensor, qr_dtype: torch.dtype, share: float, noise: float
) -> _Attempt:
    """With a shift of this share of ‖Y‖_F."""
    r = Y_dr.shape[-1]
    norm = torch.linalg.matrix_norm(Y_dr)
    shift = (share * torch.where(norm > 0, norm, 1.0))[..., None, None]
    Y_dr = Y_dr + shift * Q_dr
    core_rr = Q_dr.mT @ Y_dr
    if noise:
        core_rr = outweigh(core_rr, Y_dr, noise)
    chol_rr, info = torch.linalg.cholesky_ex((core_rr + core_rr.mT) / 2)
    failed = info > 0
    chol_rr = torch.where(failed[..., None, None], torch.eye(r).to(chol_rr), chol_rr)
    tall_dr = torch.linalg.solve_triangular(chol_rr.mT, Y_dr, upper=True, left=False)
    Qb_dr, R_rr = torch.linalg.qr(tall_dr.to(qr_dtype))
    P_rr, sigma_r = left_singular(R_rr)
    lam_r = (sigma_r.square() - shift.squeeze(-1)).clamp(min=0)
    # Both factors come column-major from LAPACK: transposed, the product is several times faster.
    return _Attempt((P_rr.mT @ Qb_dr.mT.double()).mT, lam_r, failed)
