"""The exponential average of a statistic that is kept entry by entry, and what is said about it.

Shape suffixes: B blocks of one shape, p any number of entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distcurv.curvature.ema import EmaWeights
from distcurv.curvature.innovation import ratio
from distcurv.errors import NumericsError


def mean_of_sum(sum_Bp: Tensor, count_B: Tensor) -> Tensor:
    """sum / count in float64, and the sum itself where the count is 0."""
    count_B = count_B.double()
    return sum_Bp.double() / torch.where(count_B > 0, count_B, 1.0).unsqueeze(-1)


def average(old_Bp: Tensor, mean_Bp: Tensor, shares: EmaWeights) -> Tensor:
    """The new average [B, p], in the dtype of the old."""
    a_B1, b_B1 = shares.old_share.unsqueeze(-1), shares.new_share.unsqueeze(-1)
    return (a_B1 * old_Bp.double() + b_B1 * mean_Bp).to(old_Bp.dtype)


def change(old_Bp: Tensor, mean_Bp: Tensor, known_B: Tensor) -> Tensor:
    """The innovation ‖mean − old‖/‖mean‖ [B] over the entries, float64, as `ratio` cuts it;
    −1 where there was no old."""
    mean_Bp = mean_Bp.double()
    change_B = torch.linalg.vector_norm(mean_Bp - old_Bp.double(), dim=-1)
    size_B = torch.linalg.vector_norm(mean_Bp, dim=-1)
    return torch.where(known_B, ratio(change_B, size_B), -1.0)


def require_not_negative(sum_Bp: Tensor, name: str) -> None:
    """Raise `NumericsError` for a sum of squares below 0 (NaN passes: see `check_finite`)."""
    if bool((sum_Bp < 0).any()):
        raise NumericsError(
            f"{name} has negative entries, down to {sum_Bp.min().item():.2e}: a sum of squares "
            f"cannot be; check what the layer takes as its statistic"
        )
