"""Linear layers whose weight is [Di, Do], as Hugging Face's `Conv1D` (GPT-2) has it.

Such a module computes ``x @ weight + bias`` on inputs [N, *, Di].
"""

from __future__ import annotations

from torch import Tensor, nn

from distcurv.layers.linear import LinearIO
from distcurv.layers.permuted_weight import PermutedWeight


class TransposedLinearIO(PermutedWeight, LinearIO):
    """`LayerIO` of a Linear with a transposed weight: all is as there, but the gradient's matrix
    is ``weight.grad.T``, a view."""

    def outputs(self, module: nn.Module) -> int:
        """See `PermutedWeight.outputs`."""
        return module.get_parameter(self.weight).shape[1]

    def outputs_first(self, module: nn.Module, weight: Tensor) -> Tensor:
        """See `PermutedWeight.outputs_first`: [Do, Di]."""
        return weight.mT
