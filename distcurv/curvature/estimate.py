"""The low-rank form of a factor, and how what lies outside the basis is completed.

    none       A ≈ U diag(lam) Uᵀ
    isotropic  A ≈ U diag(lam − t) Uᵀ + t I, with lam ≥ t: t is the mean of the other eigenvalues
    diagonal   A ≈ U diag(lam) Uᵀ + diag(res), res ≥ 0: exact in the diagonal

Shape suffixes, after any number of leading batch dimensions: d the side's dimension, r its rank,
m any number of columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distcurv.errors import NumericsError

# How far below zero a quantity that cannot be negative may fall, relative to the trace, and still
# count as rounding of float32 statistics summed over many rows, steps and ranks.
ROUNDING = 1e-3


class Estimate(NamedTuple):
    """A side's factor in low-rank form; lam sorted descending, trace exact."""

    U_dr: Tensor
    lam_r: Tensor
    tail: Tensor | None  # [..., 1] isotropic, [..., d] diagonal, None for no tail
    trace: Tensor  # [...]

    def has_diagonal_tail(self) -> bool:
        """Told from the shape; at d = 1 both tails are zero beside the one eigenvalue."""
        return self.tail is not None and self.tail.shape[-1] == self.U_dr.shape[-2]

    def low_rank_weights(self) -> Tensor:
        """What multiplies u uᵀ beside the tail, [..., r]: lam − t for an isotropic tail."""
        if self.tail is None or self.has_diagonal_tail():
            return self.lam_r
        return self.lam_r - self.tail

    def times(self, X_dm: Tensor) -> Tensor:
        """The estimate times X [..., d, m], in O(d r m)."""
        product_dm = self.U_dr @ (self.low_rank_weights().unsqueeze(-1) * (self.U_dr.mT @ X_dm))
        if self.tail is None:
            return product_dm
        return product_dm + self.tail.unsqueeze(-1) * X_dm

    def dense(self) -> Tensor:
        """The matrix [..., d, d]."""
        d = self.U_dr.shape[-2]
        matrix_dd = (self.U_dr * self.low_rank_weights().unsqueeze(-2)) @ self.U_dr.mT
        if self.tail is None:
            return matrix_dd
        return matrix_dd + torch.diag_embed(self.tail.expand(*self.tail.shape[:-1], d))

    def to(self, dtype: torch.dtype) -> Estimate:
        """All tensors in ``dtype``."""
        tail = None if self.tail is None else self.tail.to(dtype)
        return Estimate(self.U_dr.to(dtype), self.lam_r.to(dtype), tail, self.trace.to(dtype))

    def double(self) -> Estimate:
        """All tensors in float64."""
        return self.to(torch.float64)


def rounding_of(noise: float) -> float:
    """`ROUNDING` where each number of a sketch may err by the share ``noise`` of it besides.

    An error N of the sketch A Q shows in the estimate as N Qᵀ + Q Nᵀ − Q QᵀN Qᵀ, in the diagonal
    therefore as up to three times ``noise`` times the trace, and N's square adds less than that.
    """
    return ROUNDING + 4.0 * noise


def clamp_rounding(x: Tensor, scale: Tensor, what: str, share: float = ROUNDING) -> Tensor:
    """``x`` [..., k] without the negative values that rounding leaves, ``scale`` [...] their size.

    Raises `NumericsError` naming ``what`` where x < −``share`` · scale: that is no rounding, the
    numbers do not belong to one positive semidefinite matrix.
    """
    if bool((x < -share * scale.unsqueeze(-1)).any()):
        worst = (x.amin(-1) / scale.clamp(min=torch.finfo(x.dtype).tiny)).min().item()
        raise NumericsError(
            f"{what} is negative, {worst:.2e} of the trace: the statistic is not the sum of one "
            f"set of rows in full float32 (check TF32, autocast and row sub-sampling at capture)"
        )
    return x.clamp(min=0)


def complete(
    U_dr: Tensor,
    lam_r: Tensor,
    tail: str,
    trace: Tensor,
    diag_d: Tensor | None,
    noise: float = 0.0,
) -> Estimate:
    """The estimate whose tail makes up for what the eigenpairs leave of the trace or diagonal.

    Args:
        U_dr: orthonormal [..., d, r].
        lam_r: eigenvalues ≥ 0, descending.
        tail: ``none | isotropic | diagonal``.
        trace: tr A [...].
        diag_d: diagonal of A [..., d]; only read for a diagonal tail, needed there.
        noise: of the sketch that U and lam come from, see `rounding_of`.

    Raises:
        NumericsError: more than rounding is missing (see `clamp_rounding`).
    """
    share = rounding_of(noise)
    if tail == "isotropic":
        left_over = (trace - lam_r.sum(-1)).unsqueeze(-1)
        clamp_rounding(left_over, trace, "the isotropic tail", share)
        level = isotropic_level(lam_r.flip(-1), left_over, U_dr.shape[-2])
        return Estimate(U_dr, torch.maximum(lam_r, level), level, trace)
    if tail == "diagonal":
        assert diag_d is not None
        res_d = diag_d - (U_dr.square() * lam_r.unsqueeze(-2)).sum(-1)
        res_d = clamp_rounding(res_d, trace, "the diagonal tail", share)
        return Estimate(U_dr, lam_r, res_d, trace)
    left_over = (trace - lam_r.sum(-1)).unsqueeze(-1)
    clamp_rounding(left_over, trace, "what the basis leaves of the trace", share)
    return Estimate(U_dr, lam_r, None, trace)


def isotropic_level(lam_r: Tensor, left: Tensor, d: int) -> Tensor:
    """The isotropic tail t [..., 1]: with every eigenvalue below t raised to it the trace holds.

    With the k smallest raised, t_k = (tr − Σ of the others) / (d − r + k). This falls with k
    for as long as the next eigenvalue is below t_k, then grows: the right k has the smallest t_k.
    (Raising to t_0 once, then recomputing the tail, goes wrong near r = d: it can come out
    negative.)

    Args:
        lam_r: [..., r], ≥ 0, ascending.
        left: tr − Σ lam [..., 1], not below 0 but for rounding.
        d: dimension.
    """
    r = lam_r.shape[-1]
    if d == r:
        return torch.zeros_like(left)
    shared = torch.cat([left, left + lam_r.cumsum(-1)], -1)
    among = torch.arange(d - r, d + 1, device=lam_r.device)
    return (shared / among).amin(-1, keepdim=True).clamp_(min=0)
