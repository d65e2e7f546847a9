"""What a step has shown counts only if the step itself does.

Under AMP's loss scale a step whose gradients overflow, on any rank and in any layer, is left out.
The statistics of such a step may be finite all the same (of other layers, of other ranks), so they
are held back until the step is known to count.  Two signs tell that it does not:

* the reduced gradients are not finite (`Preconditioner.step` comes before the scaler decides);
  where ranks have parts of them, on any rank;
* the loss scale is another one: the scaler has left out ``optimizer.step()`` and has lowered the
  scale, and what is held is of the step before.

No device is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distcurv.curvature.spec import Tensors


class HeldStatistics:
    """The statistics of the step under way, by block.

    Args:
        grad_scaler: the AMP scaler whose scale the loss is multiplied with.
        everywhere: where gradients are sharded, what makes of a flag of this rank whether it is
            true on all ranks (a collective); None: the ranks have the same gradients.
    """

    def __init__(
        self,
        grad_scaler: torch.amp.GradScaler,
        everywhere: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._scaler = grad_scaler
        self._everywhere = everywhere
        self._sums: dict[int, Tensors] = {}
        self._scales: dict[int, Tensor] = {}
        self._dropped: dict[torch.device, Tensor] = {}

    @property
    def dropped(self) -> int:
        """Blocks' statistics so far that fell with their step (waits for the devices)."""
        return sum(int(count.item()) for count in self._dropped.values())

    def add(self, block: int, statistic: Tensors) -> None:
        """A contribution of a block to the step under way."""
        scale = self._scale(_count(statistic).device)
        held = self._sums.get(block)
        if held is not None:
            kept = self._kept(held, self._scales[block] == scale)
            statistic = {key: value + kept[key] for key, value in statistic.items()}
        self._sums[block], self._scales[block] = statistic, scale

    def take(self, grads: Sequence[Tensor] | None) -> dict[int, tuple[Tensors, Tensor]]:
        """The step has come to its end: by block its statistic, and whether it counts as a number,
        1 or 0 (then the statistic is zero as well).

        Args:
            grads: what this rank has of the step's reduced gradients; None where a step that
                overflows never comes here.
        """
        finite = None if grads is None else _all_finite(grads)
        if finite is not None and self._everywhere is not None:
            finite = self._everywhere(finite)
        taken = {}
        for block, held in self._sums.items():
            scale = self._scales[block]
            counts = scale == self._scale(scale.device)
            if finite is not None:
                counts = counts & finite.to(counts.device)
            taken[block] = self._kept(held, counts), counts.float()
        self.forget()
        return taken

    def forget(self) -> None:
        """Begin anew."""
        self._sums.clear()
        self._scales.clear()

    def _kept(self, statistic: Tensors, counts: Tensor) -> Tensors:
        lost = (~counts & (_count(statistic) > 0)).long()
        so_far = self._dropped.get(lost.device)
        self._dropped[lost.device] = lost if so_far is None else so_far + lost
        return {key: torch.where(counts, value, 0.0) for key, value in statistic.items()}

    def _scale(self, device: torch.device) -> Tensor:
        # As a tensor: `get_scale` would wait for the device.
        return self._scaler.scale(torch.ones((), device=device))


def _count(statistic: Tensors) -> Tensor:
    return next(value for name, value in statistic.items() if name.endswith(".count"))


def _all_finite(grads: Sequence[Tensor]) -> Tensor:
    # An empty part of a sharded gradient has no norm.
    some = [grad for grad in grads if grad.numel()]
    if not some:
        return torch.ones((), dtype=torch.bool)
    return torch.stack(torch._foreach_norm(some, float("inf"))).isfinite().all()
