"""What this rank holds of a block's gradient matrix under FSDP2 or HSDP, without communication.

A Linear's or convolution's weight is divided along the outputs: the rank has rows of the matrix,
and the bias is divided with them.  Where dimension 0 of the parameter is the input side (Embedding,
transposed layers) it has columns.  One-sided blocks are divided along their units.

Letters: O output features, I input features with the bias coordinate, D without it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distcurv.errors import ConfigError
from distcurv.layers.bare import AnyLayer
from distcurv.layers.column import Whole
from distcurv.layers.local_part import (
    Cut,
    Span,
    chunk_span,
    overlap,
    parameter_cut,
    refuse_placements,
    row_numbers,
)
from distcurv.layers.weight_bias import WeightBias


@dataclass(frozen=True)
class BlockShard:
    """This rank's part of a block.

    Attributes:
        side: what is divided: ``G`` (rows of the matrix), ``A`` (columns) or ``F`` (units).
        span: which rows, columns or units this rank has; may be empty.
        bias_rows: which entries of the bias, by output; where ``side`` is not ``A``, ``span``.
        group: the ranks that the block is divided over.
    """

    side: str
    span: Span
    bias_rows: Span
    group: dist.ProcessGroup = field(repr=False)


def block_shard(module: nn.Module, layer: AnyLayer | Whole, bias: bool) -> BlockShard | None:
    """This rank's part of a block, None where its parameters are whole.

    Raises `ConfigError` for what `refuse_shards` refuses."""
    if isinstance(layer, Whole):
        return None  # never made of sharded parameters
    refusal = refuse_shards(module, layer)
    if refusal is not None:
        raise ConfigError(f"a sharded {type(module).__name__} cannot be a block: {refusal}")
    weight, bias_parameter = _parameters(module, layer)
    cut = parameter_cut(weight)
    if cut is None:
        return None
    side, span = _weight_span(module, layer, weight, cut, cut.place)
    bias_rows = span
    if bias and side == "A" and bias_parameter is not None:
        bias_cut = parameter_cut(bias_parameter)
        assert bias_cut is not None
        bias_rows = bias_cut.own
    return BlockShard(side, span, bias_rows, cut.group)


def refuse_shards(module: nn.Module, layer: AnyLayer, by_gradient: bool = False) -> str | None:
    """Why a block cannot be preconditioned the way its parameters are sharded, or None.

    Args:
        by_gradient: its statistics are made of its gradient alone."""
    weight, bias = _parameters(module, layer)
    if by_gradient and isinstance(weight, DTensor):
        return "only its gradient shows its curvature, and it is sharded"
    for name, parameter in zip(layer.parameter_names(module), (weight, bias), strict=False):
        refusal = None if parameter is None else refuse_placements(parameter)
        if refusal is not None:
            return f"its {name} is a DTensor, but {refusal}"
    cut = parameter_cut(weight)
    bias_cut = None if bias is None else parameter_cut(bias)
    if cut is not None and _input_first(layer) and int(getattr(module, "groups", 1)) > 1:
        return "its weight is grouped and sharded along the inputs"
    if bias is None or (cut is None and bias_cut is None):
        return None
    if cut is None or bias_cut is None or cut[1:3] != bias_cut[1:3]:
        return "its weight and its bias are not sharded over the same ranks"
    for index in range(cut.parts):
        side, span = _weight_span(module, layer, weight, cut, index)
        if side != "A" and _bias_span(layer, bias, bias_cut, index) != span:
            return "its weight and its bias are not sharded at the same outputs"
    if _input_first(layer) and isinstance(layer, WeightBias) and layer.rows != layer.bias_rows:
        return "its bias is part of a longer one, and its weight is sharded along the inputs"
    return None


def _parameters(module: nn.Module, layer: AnyLayer) -> tuple[Tensor, Tensor | None]:
    weight, *rest = (module.get_parameter(name) for name in layer.parameter_names(module))
    return weight, rest[0] if rest else None


def _input_first(layer: AnyLayer) -> bool:
    return layer.one_sided is None and not layer.weight_is_matrix


def _weight_span(
    module: nn.Module, layer: AnyLayer, weight: Tensor, cut: Cut, index: int
) -> tuple[str, Span]:
    """The side that is divided, and what of the block one of the ranks has."""
    start, stop = chunk_span(cut.size, cut.parts, index)
    if _input_first(layer):
        D = layer.dims(module, False)[0]
        columns = D // cut.size
        return "A", (start * columns, stop * columns)
    units = row_numbers(weight) if layer.one_sided is not None else 1
    own = layer.rows if layer.rows is not None else (0, cut.size)
    start, stop = overlap((start, stop), own)
    span = ((start - own[0]) * units, (stop - own[0]) * units)
    return "G" if layer.one_sided is None else "F", span


def _bias_span(layer: AnyLayer, bias: Tensor, cut: Cut, index: int) -> Span:
    rows = layer.bias_rows if isinstance(layer, WeightBias) else layer.rows
    own = rows if rows is not None else (0, cut.size)
    start, stop = overlap(chunk_span(cut.size, cut.parts, index), own)
    units = row_numbers(bias)
    return (start - own[0]) * units, (stop - own[0]) * units
