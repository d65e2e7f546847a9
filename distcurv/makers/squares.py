"""Accumulated squares of gradients: diagonal AdaGrad and RMSprop, beside Shampoo's matrices.

The diagonal form of Shampoo for vectors (Gupta et al. 2018, section 4: order 1, exponent −1/2; that
is Duchi et al. 2011, AdaGrad), and the lengths that grafting gives to directions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distcurv.curvature.ema import ema_weights


def fold_squares(state: dict[str, Any], name: str, grad: Tensor, decay: float) -> None:
    """Take a gradient's squares into the mean that ``state`` holds of a parameter.

    Args:
        state: ``<name>`` the mean, like ``grad`` in float32, and ``<name>.weight`` (); both are
            made where they are missing.
        decay: of the mean, see `ema_weights`; 1 forgets nothing.

    Squares that are not finite change nothing.
    """
    squares = grad.float().square()
    if name not in state:
        state[name] = torch.zeros_like(squares)
        state[f"{name}.weight"] = squares.new_zeros((), dtype=torch.float64)
    good = torch.isfinite(squares.sum())
    weight = state[f"{name}.weight"]
    shares = ema_weights(decay, good.to(weight), weight)
    mean = torch.where(good, squares, 0.0) * shares.new_share + state[name] * shares.old_share
    state[name] = mean.to(torch.float32)
    state[f"{name}.weight"] = shares.weight


def squares_direction(
    state: dict[str, Any], name: str, grad: Tensor, decay: float, damping: float, relative: bool
) -> Tensor:
    """g / √(s + damping), s the mean of the squares, or their sum where the decay is 1.

    Args:
        relative: the damping is a multiple of the mean of s.
    """
    s = state[name].double()
    if decay == 1.0:
        s = s * state[f"{name}.weight"]
    damped = s + (damping * torch.where(s.mean() > 0, s.mean(), 1.0) if relative else damping)
    return (grad.double() / damped.sqrt()).to(torch.float32)
