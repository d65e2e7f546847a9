"""From rows to a side's statistic, with the bias as a coordinate that is always 1.

Letters: N samples, S positions, n rows looked at, d a side's dimension, r its rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distcurv.curvature.precision import at_least_float32
from distcurv.curvature.row_draw import Sampler
from distcurv.curvature.spec import SideSpec, Tensors
from distcurv.curvature.statistics import encode_rows, squares, weighted
from distcurv.errors import CaptureError, ShapeError
from distcurv.layers.layer import Rows, WeightSharing


def drawn_rows(
    rows_NSd: Tensor, sampler: Sampler, weight_sharing: WeightSharing, side_name: str
) -> Rows:
    """A copy of the drawn rows: [n, d] of all positions for ``expand``; for ``reduce`` the means
    (side A) or sums (side G) over the positions of n whole samples."""
    samples, positions = rows_NSd.shape[:2]
    if weight_sharing == "expand":
        draw = sampler.rows(samples, positions)
        some_nd = rows_NSd.flatten(0, 1)[draw.slice].clone()
        return Rows(some_nd, draw.every, samples * positions if side_name == "A" else samples)
    draw = sampler.rows(samples)
    some_nSd = at_least_float32(rows_NSd[draw.slice])
    some_nd = some_nSd.mean(1) if side_name == "A" else some_nSd.sum(1)
    return Rows(some_nd, draw.every, samples)


def require_basis(side: SideSpec, basis_dr: Tensor | None, like: Tensor) -> Tensor:
    """The basis in the dtype and on the device of the captured tensor, checked."""
    if basis_dr is None:
        raise CaptureError(
            f"a sketch of a side of dimension {side.dim} needs the installed basis; got none"
        )
    if basis_dr.shape != (side.dim, side.rank):
        raise ShapeError(
            f"the basis is {tuple(basis_dr.shape)}: the side needs ({side.dim}, {side.rank})"
        )
    return basis_dr.to(device=like.device, dtype=like.dtype)


def encode_affine_rows(
    side: SideSpec,
    rows_nd: Tensor,
    basis_dr: Tensor | None,
    bias: bool,
    weight: float | Tensor = 1.0,
) -> Tensors:
    """`encode_rows` of [rows, 1] where ``bias`` is set, without that copy for a sketch.

    Args:
        side: the side; ``side.dim`` counts the bias coordinate.
        rows_nd: [n, side.dim - bias], any float dtype.
        basis_dr: [side.dim, r] for a sketch.
        bias: append a coordinate that is always 1.
        weight: what every sum is multiplied with.
    """
    rows_nd = at_least_float32(rows_nd)
    if side.encoding == "sketch":
        basis_dr = require_basis(side, basis_dr, rows_nd)
    if not bias:
        return encode_rows(side, rows_nd, basis_dr, weight=weight)
    if basis_dr is None or side.encoding == "dense":
        ones_n1 = rows_nd.new_ones(rows_nd.shape[0], 1)
        return encode_rows(side, torch.cat([rows_nd, ones_n1], dim=1), None, weight=weight)
    projected_nr = torch.addmm(basis_dr[-1], rows_nd, basis_dr[:-1])
    y_weight_dr, y_bias_r = rows_nd.mT @ projected_nr, projected_nr.sum(0)
    sketch = affine_sketch(side, y_weight_dr, y_bias_r, squares(side, rows_nd), rows_nd.shape[0])
    return weighted(sketch, weight)


def affine_sketch(
    side: SideSpec, y_weight_dr: Tensor, y_bias_r: Tensor | None, squares: Tensors, rows: int
) -> Tensors:
    """A sketch from its parts: the weight coordinates and, unless ``y_bias_r`` is None, the bias
    coordinate, whose own sum of squares is the number of rows.

    ``squares`` are ``trace`` and, where the tail is diagonal, ``diag`` of the weight coordinates.
    """
    if y_bias_r is None:
        return {"Y": y_weight_dr, **squares}
    sketch = {"Y": torch.cat([y_weight_dr, y_bias_r.unsqueeze(0)])}
    sketch["trace"] = squares["trace"] + rows
    if side.tail == "diagonal":
        diag_d = squares["diag"]
        sketch["diag"] = torch.cat([diag_d, diag_d.new_full((1,), rows)])
    return sketch
