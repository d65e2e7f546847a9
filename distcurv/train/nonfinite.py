"""Statistics that are not finite contribute nothing, and are counted without a device waiting."""

from __future__ import annotations

import torch
from torch import Tensor

from distcurv.curvature.spec import Tensors
from distcurv.curvature.statistics import guard_finite


class FiniteGuard:
    """Lets finite statistics through and makes zeros of others."""

    def __init__(self) -> None:
        self._dropped: dict[torch.device, Tensor] = {}

    @property
    def dropped(self) -> int:
        """How many were not finite so far (waits for the devices)."""
        return sum(int(count.item()) for count in self._dropped.values())

    def __call__(self, statistic: Tensors) -> Tensors:
        """The statistic, or zeros with count 0, see `guard_finite`."""
        guarded = guard_finite(statistic)
        if guarded is not statistic:
            # Of whichever side comes first: A, or F of a block with one side.
            count = next(name for name in statistic if name.endswith(".count"))
            dropped = (statistic[count] != guarded[count]).long()
            so_far = self._dropped.get(dropped.device)
            self._dropped[dropped.device] = dropped if so_far is None else so_far + dropped
        return guarded
