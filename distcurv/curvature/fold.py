"""The weighted sum of two low-rank estimates in any two bases, cut back to rank r.

This is how an exponential average lives in low-rank form: never d x d, only a thin QR of d x 2r
and a small SVD. Exact at full rank; at any rank exact in the trace, and with a diagonal tail in
the diagonal as well: what is cut off goes to the tail.

Shape suffixes, after any number of leading batch dimensions: d dimension, r rank of the first and
of the result, s the columns of both together,
k = min(d, s), c = k − r the directions that are cut off.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distcurv.curvature.estimate import Estimate, clamp_rounding
from distcurv.curvature.factorisation import left_singular
from distcurv.errors import ShapeError


def fold(first: Estimate, second: Estimate, a: Tensor, b: Tensor) -> Estimate:
    """a · first + b · second, with the rank of ``first``.

    The eigenpairs (theta, u) of [√a U₁ √w₁, √b U₂ √w₂], w the weights beside the tail, come from
    the QR of [U₁, U₂] (its columns unscaled, so that directions of weight 0 stay in the span and
    the next sketch can find something in them) and the SVD of the scaled R in float64.

    Args:
        first, second: estimates with the same kind of tail, as `Estimate` describes.
        a, b: shares ≥ 0, [...] as the batch.

    Returns:
        An estimate in the dtype of ``first``.

    Raises:
        ShapeError: the two do not fit each other.
        NumericsError: non-finite or clearly negative numbers in either.
    """
    _check(first, second)
    dtype, (d, r) = first.U_dr.dtype, first.U_dr.shape[-2:]
    one, two = first.double(), second.double()
    a, b = a.double().unsqueeze(-1), b.double().unsqueeze(-1)
    weights_s = torch.cat(
        [
            a * clamp_rounding(one.low_rank_weights(), one.trace, "lam − t of the first estimate"),
            b * clamp_rounding(two.low_rank_weights(), two.trace, "lam − t of the second estimate"),
        ],
        -1,
    )
    Q_dk, R_ks = torch.linalg.qr(torch.cat([first.U_dr, second.U_dr.to(dtype)], -1))
    P_kk, sigma_k = left_singular(R_ks.double() * weights_s.sqrt().unsqueeze(-2))
    # What is cut off is needed for a diagonal tail alone. Both factors come column-major from
    # LAPACK: transposed, the product is several times faster.
    used = P_kk if one.has_diagonal_tail() else P_kk[..., :r]
    U_dk = (used.mT @ Q_dk.mT.double()).mT
    U_dr, cut_U_dc = U_dk[..., :r], U_dk[..., r:]
    theta_r, cut_c = sigma_k.square()[..., :r], sigma_k.square()[..., r:]
    trace = (a * one.trace.unsqueeze(-1) + b * two.trace.unsqueeze(-1)).squeeze(-1)
    if one.tail is None or two.tail is None:
        return Estimate(U_dr, theta_r, None, trace).to(dtype)
    tail = a * one.tail + b * two.tail
    if one.has_diagonal_tail():
        res_d = tail + (cut_U_dc.square() * cut_c.unsqueeze(-2)).sum(-1)
        return Estimate(U_dr, theta_r, res_d, trace).to(dtype)
    # (tr − Σ lam) / (d − r), written without the cancellation of that difference.
    level = tail + cut_c.sum(-1, keepdim=True) / (d - r) if r < d else torch.zeros_like(tail)
    return Estimate(U_dr, theta_r + tail, level, trace).to(dtype)


def _check(first: Estimate, second: Estimate) -> None:
    shapes = [None if e.tail is None else tuple(e.tail.shape) for e in (first, second)]
    if first.U_dr.shape[-2] != second.U_dr.shape[-2] or shapes[0] != shapes[1]:
        raise ShapeError(
            f"fold got bases of shapes {tuple(first.U_dr.shape)} and {tuple(second.U_dr.shape)} "
            f"with tails of shapes {shapes[0]} and {shapes[1]}: both need the same dimension and "
            f"the same kind of tail"
        )
