"""One side of a low-rank refresh: a statistic becomes an estimate and is folded into the state.

Shape suffixes: B blocks of one shape, d the side's dimension, r its rank, p = d(d+1)/2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distcurv.curvature.ema import EmaWeights
from distcurv.curvature.estimate import Estimate, complete
from distcurv.curvature.fold import fold
from distcurv.curvature.fold_sketch import Folded, Sketch, fold_sketch
from distcurv.curvature.innovation import innovation
from distcurv.curvature.nystrom import nystrom
from distcurv.curvature.power import power_eigenpairs
from distcurv.curvature.spec import BlockSpec, SideSpec, Tensors
from distcurv.curvature.triangle import unpack_triangle
from distcurv.errors import NumericsError

FIRST_PASSES = 2  # products with a dense factor before there is a basis to start from


class Products(NamedTuple):
    """Products with a dense factor, see `BlockSpec`."""

    max_itr: int = 0
    tolerance: float = 0.0


class SideRefresh(NamedTuple):
    """The new estimate and what is reported about it, [B] each."""

    estimate: Estimate
    uncaptured: Tensor
    innovation: Tensor


def refresh_side(
    side: SideSpec,
    old: Estimate,
    known: Tensor,
    statistic: Tensors,
    basis_Bdr: Tensor,
    shares: EmaWeights,
    products: Products = Products(),  # noqa: B008 - it cannot be changed
    noise: float = 0.0,
) -> SideRefresh:
    """Fold a side's statistic into its estimate.

    Args:
        side: dimension, rank, tail, encoding.
        old: the running estimate, [B, ...].
        known: [B] bool, False where ``old`` holds nothing yet.
        statistic: ``Y``, ``trace``, ``diag`` or ``packed``, and ``count``, [B, ...].
        basis_Bdr: the Q that a sketch was taken against; for a dense statistic any basis, used to
            measure the innovation.
        shares: from `ema_weights`, [B].
        products: of a dense statistic.
        noise: what each number of a sketch's ``Y`` may err by, as a share of it, beyond float32:
            `distcurv.curvature.narrow.HALF_STEP` where it travelled as float16.

    Returns:
        The new estimate in the dtype of ``old``. Where the statistic is empty it is not meaningful
        and the caller keeps the old one.

    Raises:
        NumericsError: the statistic is no sum of rows, or a factorisation failed twice.
    """
    count_B = torch.where(statistic["count"] > 0, statistic["count"], 1.0).double()
    if side.encoding == "dense":
        estimate, innovation_B = _fold_dense(
            side, old, known, statistic, count_B, basis_Bdr, shares, products
        )
    else:
        estimate, innovation_B = _fold_sketch(
            side, old, statistic, count_B, basis_Bdr, shares, noise
        )
    dtype = old.U_dr.dtype
    return SideRefresh(
        estimate.to(dtype),
        _uncaptured(estimate).to(dtype),
        torch.where(known, innovation_B, -1.0).to(dtype),
    )


def turned_basis(spec: BlockSpec, basis: Tensors, statistic: Tensors) -> Tensors:
    """``basis`` with each sketched side's U replaced by orth(Y) of ``statistic``.

    The first of the two passes of a first version: sketch against the random start, turn the basis,
    sketch the same rows again against the result, and refresh with that. Nothing is folded. All is
    [B, ...]; raises `NumericsError` as `nystrom` does.
    """
    turned = dict(basis)
    for name, side in spec.named_sides():
        if side.encoding == "sketch":
            U_Bdr = basis[f"{name}.U"]
            turned[f"{name}.U"] = nystrom(statistic[f"{name}.Y"], U_Bdr).U_dr.to(U_Bdr.dtype)
    return turned


def _fold_sketch(
    side: SideSpec,
    old: Estimate,
    statistic: Tensors,
    count_B: Tensor,
    basis_Bdr: Tensor,
    shares: EmaWeights,
    noise: float,
) -> Folded:
    """The fast way where there is one; where it stops short of an answer, the reference's."""
    if 2 * side.rank <= side.dim:
        sketch = Sketch(
            statistic["Y"], basis_Bdr, statistic["trace"], statistic.get("diag"), count_B, noise
        )
        try:
            folded = fold_sketch(old, sketch, shares)
        except NumericsError:
            folded = None  # what went wrong, if anything, is found out below
        if folded is not None:
            return folded
    U_Bdr, lam_Br = nystrom(statistic["Y"], basis_Bdr, count_B, noise)
    diag_Bd = None
    if side.tail == "diagonal":
        diag_Bd = statistic["diag"].double() / count_B[:, None]
    trace_B = statistic["trace"].double() / count_B
    second = complete(U_Bdr, lam_Br, side.tail, trace_B, diag_Bd, noise)
    mean_Y_Bdr = statistic["Y"].double() / count_B[:, None, None]
    return Folded(
        fold(old, second, shares.old_share, shares.new_share),
        innovation(old, mean_Y_Bdr, basis_Bdr),
    )


def _fold_dense(
    side: SideSpec,
    old: Estimate,
    known: Tensor,
    statistic: Tensors,
    count_B: Tensor,
    basis_Bdr: Tensor,
    shares: EmaWeights,
    products: Products,
) -> Folded:
    mean_Bdd = unpack_triangle(statistic["packed"].double() / count_B[:, None], side.dim)
    a, b = shares.old_share, shares.new_share
    old64 = old.double()
    folded_Bdd = a[:, None, None] * old64.dense() + b[:, None, None] * mean_Bdd
    passes = torch.where(known, products.max_itr or 1, products.max_itr or FIRST_PASSES)
    U_Bdr, lam_Br = power_eigenpairs(folded_Bdd, old.U_dr, passes, products.tolerance)
    diag_Bd = folded_Bdd.diagonal(dim1=-2, dim2=-1)
    trace_B = a * old64.trace + b * mean_Bdd.diagonal(dim1=-2, dim2=-1).sum(-1)
    estimate = complete(U_Bdr, lam_Br, side.tail, trace_B, diag_Bd)
    return Folded(estimate, innovation(old, mean_Bdd @ basis_Bdr.double(), basis_Bdr))


def _uncaptured(estimate: Estimate) -> Tensor:
    trace_B = estimate.trace
    left_B = (trace_B - estimate.lam_r.sum(-1)).clamp(min=0)
    return left_B / trace_B.clamp(min=torch.finfo(trace_B.dtype).tiny)
