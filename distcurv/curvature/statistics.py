"""What a training rank takes from rows or gradients: additive sums that carry their count.

A side's statistic is either ``dense`` (the packed triangle of XᵀX) or a ``sketch`` (Xᵀ(XQ) against
the installed basis Q, with the exact trace and, for a diagonal tail, the column sums of squares).
Sums are taken, never means, so statistics add over micro-batches, steps and ranks.

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
_OWN_DIMS = {"Y": 2, "diag": 1, "packed": 1, "trace": 0, "count": 0, "steps": 0}


def resolve_encoding(dim: int, rank: int, tail: str, encoding: str) -> str:
    """``auto`` made ``sketch`` or ``dense``, whichever has fewer numbers (dense when equal)."""
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
            shapes[f"{name}.packed"] = (triangle_size(side.dim),)
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
    weights_N: Tensor | float | None = None,
    product_Nr: Tensor | None = None,
    trace: Tensor | None = None,
) -> Tensors:
    """One side's statistic of the rows X: ``packed``, or ``Y``, ``trace`` and maybe ``diag``.

    Args:
        side: which encoding, rank and tail.
        rows_Nd: X [..., N, d], any float dtype; sums are taken in float32 (or float64).
        basis_dr: the installed Q [..., d, r]; not read by the dense encoding.
        weights_N: a weight per row [..., N], or one number, e.g. from `subsample_rows`.
        product_Nr: X Q [..., N, r] where the caller has it already, in full float32.
        trace: ‖X‖² [...] where the caller has it already; without weights only.

    Returns:
        Sums over the rows, by name without a prefix; the count is the caller's to add.

    Raises:
        ShapeError: rows, basis or product do not fit the side.
    """
    if rows_Nd.dim() < 2 or rows_Nd.shape[-1] != side.dim:
        raise ShapeError(
            f"encode_rows got rows of shape {tuple(rows_Nd.shape)}: the side's dim is {side.dim}"
        )
    with full_float32(rows_Nd.device):
        rows_Nd = at_least_float32(rows_Nd)
        weighted_Nd = rows_Nd
        if isinstance(weights_N, Tensor):
            weighted_Nd = rows_Nd * weights_N.to(rows_Nd.dtype).unsqueeze(-1)
        elif weights_N is not None and weights_N != 1.0:
            weighted_Nd = rows_Nd * weights_N
        if side.encoding == "dense":
            return {"packed": pack_triangle(weighted_Nd.mT @ rows_Nd)}
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
        statistic = {"Y": weighted_Nd.mT @ product_Nr.to(rows_Nd.dtype)}
        if side.tail == "diagonal":
            statistic["diag"] = (weighted_Nd * rows_Nd).sum(-2)
            statistic["trace"] = statistic["diag"].sum(-1)
        elif trace is not None:
            statistic["trace"] = trace
        else:
            # One pass and no temporary of the rows' size.
            squares_N = torch.linalg.vector_norm(rows_Nd, dim=-1).square_()
            statistic["trace"] = (squares_N if weights_N is None else squares_N * weights_N).sum(-1)
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
    return guard_finite(statistic)


def subsample_rows(
    rows_Nd: Tensor, n: int, generator: torch.Generator | None = None
) -> tuple[Tensor, float]:
    """n rows drawn without replacement and the weight N/n that keeps their sums unbiased.

    ``rows_Nd`` is [..., N, d]; all batch entries share the draw. With n >= N all rows come back
    with weight 1. The count of the statistic stays that of all N rows. ``generator`` lives on the
    CPU. Raises `ShapeError` for n < 1.
    """
    total = rows_Nd.shape[-2]
    if n < 1:
        raise ShapeError(f"subsample_rows got n = {n}: at least one row must be drawn")
    if n >= total:
        return rows_Nd, 1.0
    drawn_n = torch.randperm(total, generator=generator)[:n]
    return rows_Nd.index_select(-2, drawn_n.to(rows_Nd.device)), total / n


def guard_finite(statistic: Tensors) -> Tensors:
    """The statistic, or zeros with count and steps 0 where any of its numbers is not finite.

    Decided per batch entry with tensor operations alone, so nothing waits for the device. Names may
    be prefixed. Raises `ShapeError` for a name that no statistic has.
    """
    lead = {name: _lead_dims(name, tensor) for name, tensor in statistic.items()}
    good: Tensor | None = None
    for name, tensor in statistic.items():
        prefix, _, own = name.rpartition(".")
        if own in ("Y", "diag") and f"{prefix}.trace".lstrip(".") in statistic:
            continue  # |Y| and diag are at most the trace: the columns of Q have length 1
        finite = torch.isfinite(tensor).reshape(*tensor.shape[: lead[name]], -1).all(-1)
        good = finite if good is None else good & finite
    if good is None:
        return {}
    guarded: Tensors = {}
    for name, tensor in statistic.items():
        keep = good.view(good.shape + (1,) * (tensor.dim() - lead[name]))
        guarded[name] = torch.where(keep, tensor, 0.0)
    return guarded


def _lead_dims(name: str, tensor: Tensor) -> int:
    own = _OWN_DIMS.get(name.rpartition(".")[2])
    if own is None:
        raise ShapeError(f"a statistic has no tensor {name!r}: use {', '.join(_OWN_DIMS)}")
    return tensor.dim() - own
