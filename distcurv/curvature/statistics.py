"""What a training rank takes from rows or gradients: additive sums that carry their count.

A side's statistic is ``dense`` (the packed triangle of XᵀX), a ``sketch`` (Xᵀ(XQ) against the
installed basis Q, with the exact trace and, for a diagonal tail, the column sums of squares),
``diagonal`` (the column sums of squares alone) or, for a block of weight and bias pairs, ``unit``
(sums of products of a unit's two gradients). Sums are taken, never means, so statistics add over
micro-batches, steps and ranks.

Shape suffixes, after any number of leading batch dimensions: N rows (samples times positions),
d the side's dimension, r its rank, O output features, I input features, a and g the ranks of A, G.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distcurv.curvature.precision import at_least_float32, full_float32
from distcurv.curvature.spec import ENCODINGS, BlockSpec, SideSpec, Tensors
from distcurv.curvature.triangle import pack_triangle, triangle_size
from distcurv.errors import ShapeError

# Dimensions of each tensor of a statistic beside the batch dimensions.
_OWN_DIMS = {
    "Y": 2,
    "diag": 1,
    "packed": 1,
    "squares": 2,
    "ww": 1,
    "wb": 1,
    "bb": 1,
    "trace": 0,
    "count": 0,
    "steps": 0,
}


def resolve_encoding(dim: int, rank: int, tail: str, encoding: str) -> str:
    """``auto`` made ``sketch`` or ``dense``, whichever has fewer numbers (dense when equal).

    Other encodings are not for ``auto`` to choose: they say what a factor is, not how it travels.
    """
    if encoding == "auto":
        sketch_size = dim * rank + (dim if tail == "diagonal" else 0) + 1
        return "dense" if triangle_size(dim) <= sketch_size else "sketch"
    if encoding not in ENCODINGS:
        raise ShapeError(f"encoding is {encoding!r}: use auto, {' or '.join(ENCODINGS)}")
    return encoding


def statistic_shapes(spec: BlockSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a block's statistic, in the order in which it travels."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, side in spec.named_sides():
        if side.encoding == "dense":
            shapes[f"{name}.packed"] = (side.units * triangle_size(side.dim),)
        elif side.encoding == "diagonal":
            shapes[f"{name}.diag"] = (side.dim,)
        elif side.encoding == "unit":
            shapes |= {f"{name}.{key}": (side.dim,) for key in ("ww", "wb", "bb")}
        else:
            shapes[f"{name}.Y"] = (side.dim, side.rank)
            if side.tail == "diagonal":
                shapes[f"{name}.diag"] = (side.dim,)
            shapes[f"{name}.trace"] = ()
        shapes[f"{name}.count"] = ()
    shapes["steps"] = ()
    return shapes


def encode_rows(
    side: SideSpec,
    rows_Nd: Tensor,
    basis_dr: Tensor | None,
    *,
    weight: float | Tensor = 1.0,
    product_Nr: Tensor | None = None,
    trace: Tensor | None = None,
) -> Tensors:
    """One side's statistic of the rows X: ``packed``, or ``diag``, or ``Y``, ``trace`` and maybe
    ``diag``.

    Args:
        side: which encoding, rank and tail.
        rows_Nd: X [..., N, d], any float dtype; sums are taken in float32 (or float64).
        basis_dr: the installed Q [..., d, r]; read for a sketch alone.
        weight: what every sum is multiplied with, e.g. that of a `RowDraw`; a tensor has no
            dimension.
        product_Nr: X Q [..., N, r] where the caller has it already, in full float32.
        trace: ‖X‖² [...] where the caller has it already; not beside a weight.

    Returns:
        Sums over the rows, by name without a prefix; the count is the caller's to add.

    Raises:
        ShapeError: rows, basis or product do not fit the side, or no statistic of its encoding is
            made of one matrix of rows (``unit``).
    """
    if side.encoding == "unit":
        raise ShapeError(
            "encode_rows got a side of encoding 'unit': its statistic is made of two gradients, "
            "by the layer"
        )
    if rows_Nd.dim() < 2 or rows_Nd.shape[-1] != side.dim:
        raise ShapeError(
            f"encode_rows got rows of shape {tuple(rows_Nd.shape)}: the side's dim is {side.dim}"
        )
    with full_float32(rows_Nd.device):
        rows_Nd = at_least_float32(rows_Nd)
        if side.encoding == "dense":
            return weighted({"packed": pack_triangle(rows_Nd.mT @ rows_Nd)}, weight)
        if side.encoding == "diagonal":
            return weighted({"diag": squares(side, rows_Nd)["diag"]}, weight)
        if product_Nr is None:
            if basis_dr is None or basis_dr.shape[-2:] != (side.dim, side.rank):
                shape = None if basis_dr is None else tuple(basis_dr.shape)
                raise ShapeError(
                    f"encode_rows got a basis of shape {shape}: a sketch of this side needs "
                    f"[..., {side.dim}, {side.rank}]"
                )
            product_Nr = rows_Nd @ basis_dr.to(rows_Nd.dtype)
        elif product_Nr.shape[-2:] != (rows_Nd.shape[-2], side.rank):
            raise ShapeError(
                f"encode_rows got a product of shape {tuple(product_Nr.shape)}: it must be "
                f"[..., {rows_Nd.shape[-2]}, {side.rank}]"
            )
        statistic = {"Y": rows_Nd.mT @ product_Nr.to(rows_Nd.dtype)}
        return weighted(statistic | squares(side, rows_Nd, trace), weight)


def squares(side: SideSpec, rows_Nd: Tensor, trace: Tensor | None = None) -> Tensors:
    """``trace`` [...] and, where the tail is diagonal, ``diag`` [..., d] of XᵀX, for X [..., N, d]
    in float32 or float64.  A ``trace`` that is given is not made again."""
    if side.tail == "diagonal":
        diag_d = rows_Nd.square().sum(-2)
        return {"diag": diag_d, "trace": diag_d.sum(-1)}
    if trace is None:
        # One pass and no temporary of the rows' size.
        trace = torch.linalg.vector_norm(rows_Nd, dim=-1).square_().sum(-1)
    return {"trace": trace}


def weighted(statistic: Tensors, weight: float | Tensor) -> Tensors:
    """The statistic itself, multiplied in place."""
    if isinstance(weight, Tensor) or weight != 1.0:
        torch._foreach_mul_(list(statistic.values()), weight)
    return statistic


def encode_gradient(
    spec: BlockSpec,
    grad_OI: Tensor,
    basis: Tensors,
    *,
    grad_Ua: Tensor | None = None,
    Ug_grad: Tensor | None = None,
) -> Tensors:
    """The whole statistic of a block for the gradient source: A from XᵀX, G from XXᵀ.

    Args:
        spec: the block, with the sides A (dim I) and G (dim O).
        grad_OI: X [..., O, I], the reduced and unscaled gradient.
        basis: published tensors of the version to sketch against (``A.U``, ``G.U``).
        grad_Ua: X U_A [..., O, a] where the caller has it already, in full float32.
        Ug_grad: U_Gᵀ X [..., g, I] likewise.

    Returns:
        Statistic by prefixed names with ``A.count``, ``G.count`` and ``steps`` = 1. A gradient that
        is not finite contributes zeros (see `guard_finite`).

    Raises:
        ShapeError: the gradient does not fit the block.
    """
    dims = tuple(side.dim for side in spec.sides)
    if len(dims) != 2 or tuple(grad_OI.shape[-2:]) != (dims[1], dims[0]):
        raise ShapeError(
            f"encode_gradient got a gradient of shape {tuple(grad_OI.shape)} for block "
            f"{spec.name!r}, whose sides (A, G) have dims {dims}: give [..., dim of G, dim of A]"
        )
    products = {"A": grad_Ua, "G": None if Ug_grad is None else Ug_grad.mT}
    statistic: Tensors = {}
    one = torch.ones(grad_OI.shape[:-2], device=grad_OI.device)
    grad_OI = at_least_float32(grad_OI)
    # Of both sides; along the rows as they lie in memory.
    trace = torch.linalg.vector_norm(grad_OI, dim=-1).square_().sum(-1)
    for name, side in spec.named_sides():
        encoded = encode_rows(
            side,
            grad_OI if name == "A" else grad_OI.mT,
            basis[f"{name}.U"] if side.encoding == "sketch" else None,
            product_Nr=products[name],
            trace=trace,
        )
        statistic.update({f"{name}.{key}": value for key, value in encoded.items()})
        statistic[f"{name}.count"] = one
    statistic["steps"] = one
    # No number of the statistic is larger than the trace, whose rows have been summed with it.
    return _where(torch.isfinite(trace), statistic)


def guard_finite(statistic: Tensors) -> Tensors:
    """The statistic, or zeros with count and steps 0 where any of its numbers is not finite.

    Decided per batch entry with tensor operations alone, so nothing waits for a device. Names may
    be prefixed. Raises `ShapeError` for a name that no statistic has.
    """
    total: Tensor | None = None
    for name, tensor in statistic.items():
        prefix, _, own = name.rpartition(".")
        if own in ("Y", "diag") and f"{prefix}.trace".lstrip(".") in statistic:
            continue  # |Y| and diag are at most the trace: the columns of Q have length 1
        lead = _lead_dims(name, tensor)
        part = tensor if tensor.dim() == lead else tensor.flatten(lead).sum(-1)
        # A sum is finite only where all that is added is.
        total = part if total is None else total + part
    return {} if total is None else _where(torch.isfinite(total), statistic)


def _where(good: Tensor, statistic: Tensors) -> Tensors:
    """The statistic where ``good`` [...], zeros elsewhere."""
    if good.device.type == "cpu" and bool(good.all()):
        return statistic  # read for free on the CPU; the selection takes as long as the sketch
    kept: Tensors = {}
    for name, tensor in statistic.items():
        lead = _lead_dims(name, tensor)
        keep = good.view(good.shape + (1,) * (tensor.dim() - lead))
        kept[name] = torch.where(keep, tensor, 0.0)
    return kept


def _lead_dims(name: str, tensor: Tensor) -> int:
    own = _OWN_DIMS.get(name.rpartition(".")[2])
    if own is None:
        raise ShapeError(f"a statistic has no tensor {name!r}: use {', '.join(_OWN_DIMS)}")
    return tensor.dim() - own
