"""A tensor dimension by dimension: its statistic and what a matrix per dimension makes of it.

Shampoo keeps for dimension i of X the sum of X₍ᵢ₎ X₍ᵢ₎ᵀ, X₍ᵢ₎ being X with dimension i as its rows
and all others as its columns, and multiplies each dimension with a root of that (Gupta et al. 2018,
section 4). Of a matrix [O, I] side A is dimension 1 and side G dimension 0; the sides M0, M1, ...
of other tensors are in the order of the dimensions.

Shape suffixes: d a dimension's size, N what the others come to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distcurv.curvature.inverse import Inverse, apply_left, apply_sides
from distcurv.curvature.precision import at_least_float32
from distcurv.curvature.spec import BlockSpec, Tensors
from distcurv.curvature.statistics import encode_gradient, encode_rows, guard_finite
from distcurv.errors import ShapeError


def side_dims(shape: Sequence[int]) -> tuple[int, ...]:
    """The dimensions of a block's sides for tensors of this shape, in the order of the sides."""
    return tuple(reversed(shape)) if len(shape) == 2 else tuple(shape)


def encode_modes(spec: BlockSpec, tensor: Tensor, basis: Tensors) -> Tensors:
    """The whole statistic of a block from one gradient.

    Args:
        spec: one side for each dimension, see `side_dims`.
        tensor: the reduced and unscaled gradient, any float dtype.
        basis: published tensors of the version to sketch against.

    Returns:
        As `encode_gradient`: with counts and ``steps`` of 1, zeros where it is not finite.

    Raises:
        ShapeError: the gradient does not fit the block.
    """
    dims = tuple(side.dim for side in spec.sides)
    if side_dims(tensor.shape) != dims:
        raise ShapeError(
            f"encode_modes got a gradient of shape {tuple(tensor.shape)} for block {spec.name!r}, "
            f"whose sides have dims {dims}: give one side for each dimension"
        )
    if tensor.dim() == 2:
        return encode_gradient(spec, tensor, basis)
    tensor = at_least_float32(tensor)
    one = torch.ones((), device=tensor.device)
    statistic: Tensors = {}
    for dim, (name, side) in enumerate(spec.named_sides()):
        rows_Nd = tensor.movedim(dim, -1).reshape(-1, side.dim)
        for key, value in encode_rows(side, rows_Nd, basis.get(f"{name}.U")).items():
            statistic[f"{name}.{key}"] = value
        statistic[f"{name}.count"] = one
    statistic["steps"] = one
    return guard_finite(statistic)


def apply_modes(matrices: Sequence[Inverse], tensor: Tensor) -> Tensor:
    """Multiply each dimension of a tensor with its matrix, in the order of the sides; a new tensor
    of its shape.  On devices that round products, call it inside `full_float32`."""
    if tensor.dim() == 2:
        matrix_A, matrix_G = matrices
        return apply_sides(matrix_G, matrix_A, tensor)
    for dim, matrix in enumerate(matrices):
        moved = tensor.movedim(dim, 0)
        tensor = apply_left(matrix, moved.flatten(1)).reshape(moved.shape).movedim(0, dim)
    return tensor
