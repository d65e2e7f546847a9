"""From the gradient of the training loss to that of the per-sample loss.

The training loss may be a mean over samples, may be divided by the number of micro-batches and may
be multiplied with the AMP loss scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distcurv.errors import ConfigError

LOSS_REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class LossScale:
    """How the training loss is made of per-sample losses.

    Attributes:
        reduction: ``mean | sum``: how the loss reduces over samples.
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

    def undo(self, samples: int, device: torch.device) -> float | Tensor:
        """What an output gradient of a call on so many samples is multiplied with."""
        scale = float(self.accumulation)
        if self.reduction == "mean":
            scale *= samples
        if self.grad_scaler is None:
            return scale
        # The scale as a tensor: `get_scale` would wait for the device.
        return scale / self.grad_scaler.scale(torch.ones((), device=device))
