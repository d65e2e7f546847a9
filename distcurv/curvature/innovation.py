"""How far a statistic is from what was expected of it: what a refresh reports as innovation.

Shape suffixes: B blocks, d dimension, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distcurv.curvature.estimate import Estimate

_LARGEST = 1e6


def innovation(old: Estimate, Y_Bdr: Tensor, Q_Bdr: Tensor) -> Tensor:
    """‖Y − A_old Q‖ / ‖Y‖ [B] in float64, from the mean Y = A Q; cut as `ratio` does.

    A report: it is computed in the dtype of ``old``, with whatever precision products have there.
    """
    Y_Bdr = Y_Bdr.to(old.U_dr.dtype)
    change_Bdr = Y_Bdr - old.times(Q_Bdr.to(old.U_dr.dtype))
    change_B, size_B = (
        torch.linalg.vector_norm(matrix, dim=(-2, -1), dtype=torch.float64)
        for matrix in (change_Bdr, Y_Bdr)
    )
    return ratio(change_B, size_B)


def ratio(change_B: Tensor, size_B: Tensor) -> Tensor:
    """change / size, cut at 1e6 where the statistic vanishes against the estimate, so that it
    stays a number that can be sent; 0 where both are 0."""
    return change_B / size_B.clamp(min=1e-300).maximum(change_B / _LARGEST)
