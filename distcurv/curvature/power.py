"""Leading eigenpairs of a dense factor, warm-started from the basis of the previous version.

A block power iteration turns the whole basis at once: Q ← orth(M Q), and the last product M Q is
finished by `nystrom`, which orders and orthonormalises it. At full rank nothing needs to be
iterated and `torch.linalg.eigh` gives the exact eigenbasis.

Source: Halko, Martinsson and Tropp 2011, "Finding Structure with Randomness", Algorithm 4.4 (the
iteration) and section 5.5 (the finish for positive semidefinite matrices).

Shape suffixes, after any number of leading batch dimensions: d dimension, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distcurv.curvature.estimate import clamp_rounding
from distcurv.curvature.factorisation import eigh_descending
from distcurv.curvature.nystrom import Eigenpairs, nystrom
from distcurv.errors import NumericsError


def power_pass(M_dd: Tensor, Q_dr: Tensor) -> Tensor:
    """orth(M Q) in float64, [..., d, r]; where M Q vanishes, the columns stay near Q's."""
    Y_dr = M_dd.double() @ Q_dr.double()
    scale = Y_dr.abs().amax((-2, -1), keepdim=True)
    # A share of Q keeps the columns of a rank-deficient product apart from each other.
    Y_dr = Y_dr / torch.where(scale > 0, scale, 1.0) + torch.finfo(Y_dr.dtype).eps * Q_dr.double()
    Q_next_dr: Tensor = torch.linalg.qr(Y_dr).Q
    return Q_next_dr


def power_eigenpairs(
    M_dd: Tensor, Q_dr: Tensor, passes: Tensor | int = 1, tolerance: float = 0.0
) -> Eigenpairs:
    """The r leading eigenpairs of M, approximately (exactly where r = d).

    Args:
        M_dd: [..., d, d], symmetric positive semidefinite.
        Q_dr: the basis to start from [..., d, r], orthonormal columns.
        passes: products with M, 1 or more; a tensor [...] of them per batch entry.
        tolerance: the last product follows where the one before has moved the basis by less,
            ‖(I − Q Qᵀ) Q_next‖_F; 0: all passes are made.

    Returns:
        U in the dtype of ``Q_dr``; lam in float64, descending.

    Raises:
        NumericsError: M is not finite, or indefinite beyond rounding.
    """
    M_dd = M_dd.double()
    if not bool(torch.isfinite(M_dd).all()):
        raise NumericsError("power_eigenpairs got a matrix with NaN or infinite entries")
    d, r = Q_dr.shape[-2:]
    if r == d:
        U_dd, lam_d = eigh_descending(M_dd)
        size = M_dd.diagonal(dim1=-2, dim2=-1).abs().sum(-1)
        lam_d = clamp_rounding(lam_d, size, "an eigenvalue of a dense factor")
        return Eigenpairs(U_dd.to(Q_dr.dtype), lam_d)
    wanted = torch.as_tensor(passes, device=M_dd.device).expand(M_dd.shape[:-2])
    Q64_dr = Q_dr.double()
    for done in range(1, int(wanted.max())):
        next_dr = power_pass(M_dd, Q64_dr)
        moves = wanted > done
        if tolerance > 0:
            moved = torch.linalg.matrix_norm(next_dr - Q64_dr @ (Q64_dr.mT @ next_dr))
            wanted = torch.where(moved < tolerance, done, wanted)
        Q64_dr = torch.where(moves[..., None, None], next_dr, Q64_dr)
        if not bool((wanted > done).any()):
            break
    # In Q's dtype, so that the shift outweighs the rounding of what M was summed from.
    return nystrom((M_dd @ Q64_dr).to(Q_dr.dtype), Q64_dr)
