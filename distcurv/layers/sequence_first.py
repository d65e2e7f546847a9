"""What stands in for a module where a Linear function is called on tokens that come before samples.

`nn.MultiheadAttention` computes its projections on inputs [L, N, E] or [L N, E], whatever layout
its own inputs have: samples are then dimension 1 and cannot be read off the shape.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distcurv.errors import CaptureError


@dataclass(frozen=True)
class SequenceFirst:
    """The number of samples N of such a call."""

    samples: int

    def samples_first(self, tensor: Tensor) -> Tensor:
        """[N, L, d] from [L, N, d] or [L N, d].  Raises `CaptureError` where N does not fit."""
        if tensor.dim() == 2 and self.samples and tensor.shape[0] % self.samples == 0:
            tensor = tensor.unflatten(0, (-1, self.samples))
        if tensor.dim() != 3 or tensor.shape[1] != self.samples:
            raise CaptureError(
                f"a projection of an attention over {self.samples} samples got a tensor of shape "
                f"{tuple(tensor.shape)}: it must be [L, {self.samples}, features]"
            )
        return tensor.transpose(0, 1)
