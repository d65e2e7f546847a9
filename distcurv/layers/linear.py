"""nn.Linear on inputs [N, *, Di] with any number of middle dimensions.

Letters: N samples, S positions, d a side's dimension, r its rank.
"""

from __future__ import annotations

from torch import Tensor, nn

from distcurv.curvature.precision import at_least_float32
from distcurv.curvature.row_draw import Sampler
from distcurv.curvature.spec import SideSpec, Tensors
from distcurv.errors import CaptureError
from distcurv.layers.affine_rows import drawn_rows, encode_affine_rows
from distcurv.layers.layer import Rows, WeightSharing
from distcurv.layers.sequence_first import SequenceFirst
from distcurv.layers.weight_bias import WeightBias


class LinearIO(WeightBias):
    """`LayerIO` of `torch.nn.Linear`: the middle dimensions are the positions."""

    call_kind = "linear"

    def input_statistic(
        self,
        module: nn.Module | SequenceFirst,
        input: Tensor,
        side: SideSpec,
        basis_dr: Tensor | None,
        *,
        bias: bool,
        weight_sharing: WeightSharing,
    ) -> Tensors:
        """See `LayerIO.input_statistic`."""
        x_NSd = at_least_float32(_positions(module, input, "input"))
        rows = x_NSd.mean(1) if weight_sharing == "reduce" else x_NSd.flatten(0, 1)
        statistic = encode_affine_rows(side, rows, basis_dr, bias)
        statistic["count"] = rows.new_full((), rows.shape[0])
        return statistic

    def output_statistic(
        self,
        module: nn.Module | SequenceFirst,
        grad_output: Tensor,
        side: SideSpec,
        basis_dr: Tensor | None,
        *,
        weight_sharing: WeightSharing,
    ) -> Tensors:
        """See `LayerIO.output_statistic`."""
        g_NSd = at_least_float32(_positions(module, grad_output, "output gradient"))
        rows = g_NSd.sum(1) if weight_sharing == "reduce" else g_NSd.flatten(0, 1)
        statistic = encode_affine_rows(side, rows, basis_dr, bias=False)
        statistic["count"] = rows.new_full((), g_NSd.shape[0])
        return statistic

    def input_rows(
        self,
        module: nn.Module | SequenceFirst,
        input: Tensor,
        sampler: Sampler,
        *,
        weight_sharing: WeightSharing,
    ) -> Rows:
        """See `LayerIO.input_rows`."""
        return drawn_rows(_positions(module, input, "input"), sampler, weight_sharing, "A")

    def output_rows(
        self,
        module: nn.Module | SequenceFirst,
        grad_output: Tensor,
        sampler: Sampler,
        *,
        weight_sharing: WeightSharing,
    ) -> Rows:
        """See `LayerIO.output_rows`."""
        g_NSd = _positions(module, grad_output, "output gradient")
        return drawn_rows(g_NSd, sampler, weight_sharing, "G")


def _positions(module: object, tensor: Tensor, what: str) -> Tensor:
    """[N, S, d] from [N, *, d], or from what `SequenceFirst` says."""
    if isinstance(module, SequenceFirst):
        return module.samples_first(tensor.detach())
    if tensor.dim() < 2:
        raise CaptureError(
            f"a Linear layer got an {what} of shape {tuple(tensor.shape)}: without a batch "
            "dimension samples cannot be counted; give it [N, ..., features], e.g. x.unsqueeze(0)"
        )
    return tensor.detach().reshape(tensor.shape[0], -1, tensor.shape[-1])
