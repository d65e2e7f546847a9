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
from distcurv.curvature.nystrom import nystrom
from distcurv.curvature.power import power_eigenpairs
from distcurv.curvature.spec import BlockSpec, SideSpec, Tensors
from distcurv.curvature.triangle import unpack_triangle

FIRST_PASSES = 2  # products with a dense factor before there is a basis to start from


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

    Returns:
        The new estimate in the dtype of ``old``. Where the statistic is empty it is not meaningful
        and the caller keeps the old one.

    Raises:
        NumericsError: the statistic is no sum of rows, or a factorisation failed twice.
    """
    dtype = old.U_dr.dtype
    count_B = torch.where(statistic["count"] > 0, statistic["count"], 1.0).double()
    if side.encoding == "dense":
        mean_Bdd = unpack_triangle(statistic["packed"].double() / count_B[:, None], side.dim)
        mean_Y_Bdr = mean_Bdd @ basis_Bdr.double()
        estimate = _from_dense(side, old, known, mean_Bdd, shares)
    else:
        mean_Y_Bdr = statistic["Y"].double() / count_B[:, None, None]
        second = _from_sketch(side, statistic, basis_Bdr, count_B)
        estimate = fold(old, second, shares.old_share, shares.new_share)
    return SideRefresh(
        estimate.to(dtype),
        _uncaptured(estimate).to(dtype),
        _innovation(old, known, mean_Y_Bdr, basis_Bdr).to(dtype),
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


def _from_sketch(
    side: SideSpec, statistic: Tensors, basis_Bdr: Tensor, count_B: Tensor
) -> Estimate:
    U_Bdr, lam_Br = nystrom(statistic["Y"], basis_Bdr, count_B)
    diag_Bd = None
    if side.tail == "diagonal":
        diag_Bd = statistic["diag"].double() / count_B[:, None]
    return complete(U_Bdr, lam_Br, side.tail, statistic["trace"].double() / count_B, diag_Bd)


def _from_dense(
    side: SideSpec, old: Estimate, known: Tensor, mean_Bdd: Tensor, shares: EmaWeights
) -> Estimate:
    a, b = shares.old_share, shares.new_share
    old64 = old.double()
    folded_Bdd = a[:, None, None] * old64.dense() + b[:, None, None] * mean_Bdd
    passes = torch.where(known, 1, FIRST_PASSES)
    U_Bdr, lam_Br = power_eigenpairs(folded_Bdd, old.U_dr, passes)
    diag_Bd = folded_Bdd.diagonal(dim1=-2, dim2=-1)
    trace_B = a * old64.trace + b * mean_Bdd.diagonal(dim1=-2, dim2=-1).sum(-1)
    return complete(U_Bdr, lam_Br, side.tail, trace_B, diag_Bd)


def _uncaptured(estimate: Estimate) -> Tensor:
    trace_B = estimate.trace.double()
    share_B = 1.0 - estimate.lam_r.double().sum(-1) / torch.where(trace_B > 0, trace_B, 1.0)
    return torch.where(trace_B > 0, share_B, 0.0).clamp(min=0.0)


def _innovation(old: Estimate, known: Tensor, Y_Bdr: Tensor, Q_Bdr: Tensor) -> Tensor:
    # A report: float32 (or TF32) is precise enough, and a third of the time.
    Y_Bdr = Y_Bdr.to(old.U_dr.dtype)
    expected_Bdr = old.times(Q_Bdr.to(old.U_dr.dtype))
    size_B, change_B = (
        torch.linalg.vector_norm(matrix, dim=(-2, -1), dtype=torch.float64)
        for matrix in (Y_Bdr, Y_Bdr - expected_Bdr)
    )
    # Where the statistic vanishes against the estimate the ratio is cut at 1e6, so that it stays a
    # number that can be sent.
    floor_B = 1e-6 * change_B
    ratio_B = change_B / torch.where(size_B > floor_B, size_B, floor_B).clamp(min=1e-300)
    return torch.where(known, ratio_B, -1.0)
