"""How much of the old estimate stays when n statistic steps arrive at once.

Letters: n statistic steps, rho the decay per step, w the EMA weight that an estimate carries
(0 before the first statistic, towards 1 afterwards).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distcurv.errors import ConfigError


class EmaWeights(NamedTuple):
    """new = ``old_share`` * old + ``new_share`` * mean of the statistic; shares sum to 1."""

    old_share: Tensor  # a = rho^n w / w'
    new_share: Tensor  # b = (1 - rho^n) / w'
    weight: Tensor  # w' = rho^n w + 1 - rho^n


def ema_weights(decay: float, steps: Tensor, weight: Tensor) -> EmaWeights:
    """Shares of a bias-corrected exponential average over ``steps`` equal steps.

    The same as Adam's bias correction (Kingma and Ba 2015, section 3) applied n times in a row.

    Args:
        decay: rho, 0 <= rho <= 1.  With 1 nothing is forgotten: the mean of all, w' = w + n.
        steps: n [B] or (), any dtype, n >= 0. Where n = 0 nothing changes: a = 1, b = 0, w' = w.
        weight: w [B] or ().

    Returns:
        a, b, w' in float64, shaped as the broadcast of ``steps`` and ``weight``.

    Raises:
        ConfigError: the decay is outside [0, 1].
    """
    if not 0.0 <= decay <= 1.0:
        raise ConfigError(f"decay is {decay}: give 0 <= decay <= 1")
    kept = torch.pow(decay, steps.double())
    fresh = 1.0 - kept if decay < 1.0 else steps.double()
    total = kept * weight.double() + fresh
    new_share = fresh / torch.where(total > 0, total, 1.0)
    return EmaWeights(1.0 - new_share, new_share, total)
