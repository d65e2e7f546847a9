"""What every kind does with a batch of blocks: nothing new means no change, and no NaN leaves.

Letters: B blocks of one shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distcurv.curvature.spec import BlockSpec, Tensors
from distcurv.errors import NumericsError


def counted_steps(spec: BlockSpec, statistic: Tensors) -> Tensor:
    """The steps [B] that a statistic stands for, 0 where any side's count is 0."""
    steps_B = statistic["steps"]
    for name, _ in spec.named_sides():
        steps_B = torch.where(statistic[f"{name}.count"] > 0, steps_B, torch.zeros_like(steps_B))
    return steps_B


def keep_where_empty(steps_B: Tensor, new: Tensors, old: Tensors) -> Tensors:
    """``new`` where there were steps, else ``old`` bit for bit; [B, ...] by name."""
    kept: Tensors = {}
    for name, tensor in new.items():
        some = (steps_B > 0).view(-1, *[1] * (tensor.dim() - 1))
        kept[name] = torch.where(some, tensor, old[name])
    return kept


def check_finite(tensors: Tensors, kind: str) -> None:
    """Raise `NumericsError` when a refresh made a number that is not finite."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NumericsError(
                f"a refresh of kind {kind!r} made {name} with NaN or infinite entries: keep the "
                f"previous version and count the failure"
            )
