"""Orthonormal coordinates in the span of a basis and of a sketch, for a refresh that needs no more.

The basis U is orthonormal but for rounding. What a sketch Y has beside it, D = Y − U UᵀY, is in
the usual case so well conditioned (its columns are mostly sampling noise) that V = D L⁻ᵀ, with
L Lᵀ = DᵀD, is as orthonormal as from a QR: Cholesky QR, whose error is rounding times the squared
condition (Yamamoto, Nakatsukasa, Yanagisawa and Fukaya 2015). Then V is never formed. Where it is
not the usual case, V comes from a QR and is projected again until it is orthogonal to U.

What rounding leaves of UᵀU − I and UᵀV is measured and put right to first order in the small
matrices, for U by a Newton-Schulz step (Björck and Bowie 1971): so nothing adds up over refreshes.

Shape suffixes: B blocks, d dimension, r columns of U and of Y each, s = 2r, k any number of
vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# UᵀV may be so large that what its square leaves out does not show in float32.
_LOOSE = 1e-4

# Cholesky QR where every column of D adds at least this share of itself to those before it.
_ADDS = 0.3

# Rounding noise, which is all of a column of D for which the sketch had nothing new, lies in no
# special direction: the second projection finds most of it outside of U, the third the rest.
_PROJECTIONS = 3


class Frame(NamedTuple):
    """Coordinates X stand for [U (3I − UᵀU)/2, V − U UᵀV] X."""

    U_Bdr: Tensor
    D_Bdr: Tensor
    UU_Brr: Tensor  # UᵀU
    UD_Brr: Tensor  # UᵀD
    chol_Brr: Tensor | None  # L, float64; None where D is V itself

    def vectors(self, X_Bsk: Tensor) -> Tensor:
        """[B, d, k] in the dtype of U, from float64 coordinates [B, s, k]."""
        r, dtype = self.U_Bdr.shape[-1], self.U_Bdr.dtype
        U_Brk, D_Brk = X_Bsk[:, :r].to(dtype), X_Bsk[:, r:]
        if self.chol_Brr is not None:
            D_Brk = torch.linalg.solve_triangular(self.chol_Brr.mT, D_Brk, upper=True)
        D_Brk = D_Brk.to(dtype)
        U_Brk = torch.baddbmm(U_Brk, self.UU_Brr, U_Brk, beta=1.5, alpha=-0.5)
        U_Brk.baddbmm_(self.UD_Brr, D_Brk, alpha=-1)
        return (self.U_Bdr @ U_Brk).baddbmm_(self.D_Bdr, D_Brk)


def frame_with(U_Bdr: Tensor, Y_Bdr: Tensor) -> tuple[Frame, Tensor]:
    """A frame in which both lie, and the coordinates of Y [B, s, r] in float64."""
    UY_Brr = U_Bdr.mT @ Y_Bdr
    D_Bdr = torch.baddbmm(Y_Bdr, U_Bdr, UY_Brr, alpha=-1)
    UU_Brr, UD_Brr, DD_Brr = U_Bdr.mT @ U_Bdr, U_Bdr.mT @ D_Bdr, (D_Bdr.mT @ D_Bdr).double()
    chol_Brr, info_B = torch.linalg.cholesky_ex(DD_Brr)
    needed_Br = torch.maximum(
        DD_Brr.diagonal(dim1=-2, dim2=-1).sqrt() * _ADDS, UD_Brr.abs().amax(-2) / _LOOSE
    )
    adds_Br = chol_Brr.diagonal(dim1=-2, dim2=-1) - needed_Br
    if not bool(torch.cat([adds_Br, -info_B.unsqueeze(-1)], -1).amin() >= 0):
        return _by_qr(U_Bdr, UU_Brr, D_Bdr, UY_Brr.double())
    frame = Frame(U_Bdr, D_Bdr, UU_Brr, UD_Brr, chol_Brr)
    return frame, torch.cat([UY_Brr.double() + UD_Brr, chol_Brr.mT], -2)


def _by_qr(U_Bdr: Tensor, UU_Brr: Tensor, D_Bdr: Tensor, UY_Brr: Tensor) -> tuple[Frame, Tensor]:
    V_Bdr, R_Brr = torch.linalg.qr(D_Bdr)
    R_Brr = R_Brr.double()
    for projections in range(1, _PROJECTIONS + 1):
        UV_Brr = U_Bdr.mT @ V_Bdr
        UY_Brr = torch.baddbmm(UY_Brr, UV_Brr.double(), R_Brr)
        if projections == _PROJECTIONS or not bool(UV_Brr.abs().amax() > _LOOSE):
            break
        V_Bdr, again_Brr = torch.linalg.qr(torch.baddbmm(V_Bdr, U_Bdr, UV_Brr, alpha=-1))
        R_Brr = again_Brr.double() @ R_Brr
    return Frame(U_Bdr, V_Bdr, UU_Brr, UV_Brr, None), torch.cat([UY_Brr, R_Brr], -2)
