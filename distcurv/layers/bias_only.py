"""The trained bias of a layer whose weight is frozen (or is not captured): kind diagonal.

Per-sample gradient of the bias: the sum of the output gradients over the positions, so nothing of
the input is needed.

Letters: N samples, n of them looked at, U units.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from distcurv.curvature.row_draw import Sampler
from distcurv.curvature.spec import Tensors
from distcurv.layers.joint import Kept, UnitWeights, draw_samples, drawn_gradient, squares_and_count
from distcurv.layers.unit_positions import count_positions, positions_of, sum_positions


class BiasOnlyIO(UnitWeights):
    """`JointIO` of the bias alone, which is the block's ``weight``.

    Args:
        bias: the name of the bias in the module.
        rows: (start, stop): the block is only these units; None for all of them.
    """

    one_sided: str = "diagonal"

    def __init__(self, bias: str = "bias", rows: tuple[int, int] | None = None) -> None:
        super().__init__(weight=bias, bias=None, rows=rows)

    def refuse(self, module: nn.Module) -> str | None:
        """See `LayerIO.refuse`."""
        bias = module._parameters.get(self.weight)
        if bias is None or isinstance(bias, UninitializedParameter) or not bias.requires_grad:
            return f"it has no {self.weight} that is trained"
        return None

    def keep(self, module: nn.Module, input: Tensor, sampler: Sampler | None) -> Kept:
        """See `JointIO.keep`; the positions of the input are taken for those of the output, which
        only decides how many samples are drawn."""
        positions = count_positions(input, positions_of(module, input))
        return Kept({}, draw_samples(len(input), positions, sampler), len(input))

    def statistic(
        self, module: nn.Module, kept: Kept, grad_output: Tensor, *, bias: bool
    ) -> Tensors:
        """See `JointIO.statistic`."""
        grads_nU1 = self.sample_gradients(module, kept, grad_output, bias=bias)
        return squares_and_count(kept, grads_nU1.squeeze(-1))

    def sample_gradients(
        self, module: nn.Module, kept: Kept, grad_output: Tensor, *, bias: bool
    ) -> Tensor:
        """See `ShowsSamples.sample_gradients`."""
        g = drawn_gradient(kept, grad_output)
        return sum_positions(g, positions_of(module, g)).unsqueeze(-1)
