"""From the gradient of the training loss to that of a single term of it.

The training loss may be a mean over its terms, may be divided by the number of micro-batches and
may be multiplied with the AMP loss scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distcurv.errors import ConfigError

LOSS_REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class LossScale:
    """How the training loss is made of its terms.

    Attributes:
        reduction: ``mean | sum``: how the loss reduces over terms.
        accumulation: the number by which the user divides the loss of one micro-batch.
        grad_scaler: the AMP scaler whose scale the loss is multiplied with.

    Raises `ConfigError` for a bad reduction or accumulation.
    """

    reduction: str
    accumulation: int
    grad_scaler: torch.amp.GradScaler | None

    def __post_init__(self) -> None:
        if self.reduction not in LOSS_REDUCTIONS:
            raise ConfigError(
                f"loss_reduction is {self.reduction!r}: use one of {', '.join(LOSS_REDUCTIONS)}"
            )
        if self.accumulation < 1:
            raise ConfigError(
                f"accumulation is {self.accumulation}: give the number of micro-batches"
            )

    def undo(self, divisor: int | Tensor, device: torch.device) -> float | Tensor:
        """What an output gradient is multiplied with where a ``mean`` has divided by so much."""
        scale: float | Tensor = float(self.accumulation)
        if self.reduction == "mean":
            scale = scale * divisor
        if self.grad_scaler is None:
            return scale
        # The scale as a tensor: `get_scale` would wait for the device.
        return scale / self.grad_scaler.scale(torch.ones((), device=device))

    def fisher_factor(self, terms: float | Tensor | None, world_size: int) -> float | Tensor:
        """What makes the Fisher of one term of the outer product of the reduced gradient.

        Args:
            terms: loss terms of this rank's step, all micro-batches together; None: nothing has
                shown how many, then the gradient counts as that of a single one.
            world_size: ranks over which the gradient was averaged, each with as many terms.
        """
        if terms is None:
            return 1.0
        if self.reduction == "mean":
            return terms * world_size
        undone = world_size * self.accumulation**2
        if isinstance(terms, Tensor):
            return torch.where(terms > 0, undone / terms, 0.0)
        return undone / terms if terms > 0 else 0.0
