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


def clamp_rounding(x: Tensor, scale: Tensor, what: str) -> Tensor:
    """``x`` [..., k] without the negative values that rounding leaves, ``scale`` [...] their size.

    Raises `NumericsError` naming ``what`` where x < −`ROUNDING` · scale: that is no rounding, the
    numbers do not belong to one positive semidefinite matrix.
    """
    if bool((x < -ROUNDING * scale.unsqueeze(-1)).any()):
        worst = (x.amin(-1) / scale.clamp(min=torch.finfo(x.dtype).tiny)).min().item()
        raise NumericsError(
            f"{what} is negative, {worst:.2e} of the trace: the statistic is not the sum of one "
            f"set of rows in full float32 (check TF32, autocast and row sub-sampling at capture)"
        )
    return x.clamp(min=0)


def complete(
    U_dr: Tensor, lam_r: Tensor, tail: str, trace: Tensor, diag_d: Tensor | None
) -> Estimate:
    """The estimate whose tail makes up for what the eigenpairs leave of the trace or diagonal.

    Args:
        U_dr: orthonormal [..., d, r].
        lam_r: eigenvalues ≥ 0, descending.
        tail: ``none | isotropic | diagonal``.
        trace: tr A [...].
        diag_d: diagonal of A [..., d]; only read for a diagonal tail, needed there.

    Raises:
        NumericsError: more than rounding is missing (see `clamp_rounding`).
    """
    if tail == "isotropic":
        lam_r, level = _level(lam_r, trace, U_dr.shape[-2])
        return Estimate(U_dr, lam_r, level.unsqueeze(-1), trace)
    if tail == "diagonal":
        assert diag_d is not None
        res_d = diag_d - (U_dr.square() * lam_r.unsqueeze(-2)).sum(-1)
        return Estimate(U_dr, lam_r, clamp_rounding(res_d, trace, "the diagonal tail"), trace)
    left_over = (trace - lam_r.sum(-1)).unsqueeze(-1)
    clamp_rounding(left_over, trace, "what the basis leaves of the trace")
    return Estimate(U_dr, lam_r, None, trace)


def _level(lam_r: Tensor, trace: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Raise the smallest eigenvalues to the tail's level t, so that lam ≥ t and the trace holds.

    With the k smallest raised, t_k = (tr − Σ of the others) / (d − r + k); the right k is the first
    whose smallest untouched eigenvalue is ≥ t_k. (Raising to t_0 once, then recomputing the tail,
    goes wrong near r = d: the tail can come out negative.)
    """
    r = lam_r.shape[-1]
    kept_sum = torch.cat([lam_r.new_zeros(*lam_r.shape[:-1], 1), lam_r.cumsum(-1)], -1)
    left_over = trace.unsqueeze(-1) - kept_sum  # [..., r+1], by the number of untouched ones
    untouched = torch.arange(r + 1, device=lam_r.device)
    level = clamp_rounding(left_over, trace, "the isotropic tail") / (d - untouched).clamp(min=1)
    if d == r:
        level[..., r] = 0.0
    smallest = torch.cat([lam_r.new_full((*lam_r.shape[:-1], 1), torch.inf), lam_r], -1)
    # The largest number of untouched eigenvalues that fits; 0 always does.
    fits = torch.where(smallest >= level, untouched, 0).amax(-1, keepdim=True)
    chosen = level.gather(-1, fits).squeeze(-1)
    return torch.maximum(lam_r, chosen.unsqueeze(-1)), chosen
