"""Packed symmetric matrices: half the bytes of a dense factor, for links and broadcasts.

The upper triangle by rows: M[0,0], M[0,1], ..., M[0,d-1], M[1,1], ...
Letters: d the matrix's dimension, p = d(d+1)/2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distcurv.errors import ShapeError


def triangle_size(d: int) -> int:
    """Numbers in the packed triangle of a d x d matrix."""
    return d * (d + 1) // 2


def pack_triangle(matrix_dd: Tensor) -> Tensor:
    """Upper triangle by rows, [..., d, d] -> [..., d(d+1)/2]; the lower half is not read.

    Raises `ShapeError` when the last two dimensions differ.
    """
    if matrix_dd.dim() < 2 or matrix_dd.shape[-1] != matrix_dd.shape[-2]:
        raise ShapeError(
            f"pack_triangle got a tensor of shape {tuple(matrix_dd.shape)}: "
            f"its last two dimensions must be equal"
        )
    d = matrix_dd.shape[-1]
    row_p, column_p = torch.triu_indices(d, d, device=matrix_dd.device)
    return matrix_dd[..., row_p, column_p]


def unpack_triangle(packed_p: Tensor, d: int) -> Tensor:
    """The symmetric matrix [..., d, d] of a packed triangle [..., d(d+1)/2].

    Raises `ShapeError` when the last dimension is not d(d+1)/2.
    """
    if packed_p.shape[-1:] != (triangle_size(d),):
        raise ShapeError(
            f"unpack_triangle got a tensor of shape {tuple(packed_p.shape)}: "
            f"its last dimension must be {triangle_size(d)} for d = {d}"
        )
    row_p, column_p = torch.triu_indices(d, d, device=packed_p.device)
    matrix_dd = packed_p.new_empty(*packed_p.shape[:-1], d, d)
    matrix_dd[..., row_p, column_p] = packed_p
    matrix_dd[..., column_p, row_p] = packed_p
    return matrix_dd


def diagonal_of_triangle(packed_p: Tensor, d: int) -> Tensor:
    """The diagonal [..., d] of a packed triangle, without unpacking it."""
    i_d = torch.arange(d, device=packed_p.device)
    return packed_p[..., i_d * d - i_d * (i_d - 1) // 2]
