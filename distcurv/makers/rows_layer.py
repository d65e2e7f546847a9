"""A layer whose statistics are the rows themselves, where they are fewer than the dimensions.

For SKFAC.  The rows are under ``Y``, [n, d], or their matrix [d, d]; ``trace`` is their sum of
squares.  What scales a statistic multiplies both, so the rows are right up to a factor that the
trace tells: see `rows_of`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distcurv.curvature.row_draw import Sampler
from distcurv.curvature.spec import SideSpec, Tensors
from distcurv.layers.layer import LayerIO, WeightSharing

_ALL_ROWS = Sampler(1 << 62, 0)


class RowsLayer:
    """`LayerIO` of another layer's blocks.

    Args:
        layer: whose rows.
        outputs_add: output gradients arrive several times a step and add up, which only matrices
            do.
    """

    def __init__(self, layer: LayerIO, outputs_add: bool) -> None:
        self._layer = layer
        self._outputs_add = outputs_add

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def input_statistic(
        self,
        module: nn.Module,
        input: Tensor,
        side: SideSpec,
        basis_dr: Tensor | None,
        *,
        bias: bool,
        weight_sharing: WeightSharing,
    ) -> Tensors:
        """See `LayerIO.input_statistic`."""
        rows = self._layer.input_rows(module, input, _ALL_ROWS, weight_sharing=weight_sharing)
        rows_nd = rows.rows_nd.float()
        if bias:
            rows_nd = torch.cat([rows_nd, rows_nd.new_ones(len(rows_nd), 1)], 1)
        return _encode(rows_nd, rows.count, as_matrix=False)

    def output_statistic(
        self,
        module: nn.Module,
        grad_output: Tensor,
        side: SideSpec,
        basis_dr: Tensor | None,
        *,
        weight_sharing: WeightSharing,
    ) -> Tensors:
        """See `LayerIO.output_statistic`."""
        rows = self._layer.output_rows(
            module, grad_output, _ALL_ROWS, weight_sharing=weight_sharing
        )
        return _encode(rows.rows_nd.float(), rows.count, as_matrix=self._outputs_add)


def rows_of(statistic: Tensors, side: str) -> Tensor:
    """The rows [n, d], n < d, or the matrix [d, d] of a side, scaled as sums are, float64."""
    held, trace = statistic[f"{side}.Y"].double(), statistic[f"{side}.trace"].double()
    if held.shape[0] == held.shape[1]:
        return held
    norm = torch.linalg.vector_norm(held)
    return held * torch.where(norm > 0, trace.sqrt() / torch.where(norm > 0, norm, 1.0), 0.0)


def _encode(rows_nd: Tensor, count: int, *, as_matrix: bool) -> Tensors:
    n, d = rows_nd.shape
    return {
        "Y": rows_nd.mT @ rows_nd if as_matrix or n >= d else rows_nd,
        "trace": rows_nd.square().sum(),
        "count": rows_nd.new_full((), count),
    }
