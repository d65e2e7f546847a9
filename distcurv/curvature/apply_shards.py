"""P = G⁻¹ ∇W A⁻¹ where every rank holds only some rows, or only some columns, of ∇W.

The formulas are those of `distcurv.curvature.apply`; its two thin products Z = X E and V = CᵀX are
what rows and columns have to do with one another.  With rows at hand Z is local and V is the sum
over the ranks, g·I numbers; with columns V is local and Z is the sum, a·O numbers (and V's bias
column, g numbers).  So the work has two halves around one sum over ranks:

    rows (side G divided):     add up V;          then CᵀZ = V E, and the rest is local
    columns (side A divided):  add up Z, V's bias; then CᵀZ, and the rest is local

The numbers for the norm rules are added up with them, but for ‖P‖², which is known only afterwards.
One-sided blocks are local but for these numbers.

Shape suffixes: O output features, I input features (with the bias coordinate), D without it, o and
i those of this rank, g, a ranks of sides G and A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distcurv.curvature.apply import (
    AffineGradient,
    Columns,
    ThinFactors,
    apply,
    room,
    row_norms,
    scale_columns,
    square_norm,
    subtract_product,
)
from distcurv.curvature.inverse import LowRankInverse
from distcurv.curvature.one_sided import OneSidedInverse, UnitInverse

Span = tuple[int, int]  # (start, stop)


class PreparedShard(NamedTuple):
    """What `prepare_block` made of a whole block, cut to what this rank holds.

    ``side`` is ``G`` (rows), ``A`` (columns) or ``F`` (units); ``bias_rows`` are the outputs of
    which this rank has the bias."""

    side: str
    own: ThinFactors | OneSidedInverse
    bias_rows: Span


class Half(NamedTuple):
    """Where `begin` stopped: the sum of ``addends`` over the ranks is due.

    ``addends``: matrices and, where asked for, the numbers [‖∇W‖², inner]; all float32."""

    addends: tuple[Tensor, ...]
    measured: bool


class AppliedShard(NamedTuple):
    """As `Applied`, for all ranks together, but ``square``, this rank's addend to ‖P‖²."""

    row_o1: Tensor | None
    grad_norm: Tensor | None
    square: Tensor | None
    inner: Tensor | None


def cut_prepared(
    prepared: ThinFactors | OneSidedInverse, side: str, span: Span, bias_rows: Span
) -> PreparedShard:
    """Copy of a block's `Prepared` what this rank's part needs, once for each version."""
    start, stop = span
    if isinstance(prepared, UnitInverse):
        return PreparedShard(side, UnitInverse(*(d[start:stop] for d in prepared)), bias_rows)
    if isinstance(prepared, LowRankInverse):
        own = LowRankInverse(prepared.inv_diag[start:stop], prepared.W_dr[start:stop])
        return PreparedShard(side, own, bias_rows)
    cut = _cut_rows if side == "G" else _cut_columns
    return PreparedShard(side, cut(prepared, start, stop), bias_rows)


def _cut_rows(whole: ThinFactors, start: int, stop: int) -> ThinFactors:
    left_kO, (a, _) = whole.left_Ok.mT, whole.Z_aO.shape
    left_ko = room(left_kO, left_kO.shape[0], stop - start).copy_(left_kO[:, start:stop])
    row_o1, C_go = whole.row_O1, left_ko[a:]
    if row_o1.shape[0] > 1:
        row_o1, C_go = row_o1[start:stop], whole.C_gO[:, start:stop].contiguous()
    return whole._replace(Z_aO=left_ko[:a], left_Ok=left_ko.mT, C_gO=C_go, row_O1=row_o1)


def _cut_columns(whole: ThinFactors, start: int, stop: int) -> ThinFactors:
    every_kI, (a, _) = whole.right_kI.all_I, whole.Z_aO.shape
    bias = whole.right_kI.weight_D.shape[-1] < every_kI.shape[-1]

    def own(tensor: Tensor) -> Tensor:
        part = tensor[:, start:stop]
        return torch.cat([part, tensor[:, -1:]], 1) if bias else part

    right_ki = room(every_kI, every_kI.shape[0], stop - start + bias).copy_(own(every_kI))
    return whole._replace(
        E_aI=Columns.of(right_ki[:a], bias),
        V_gI=Columns.of(right_ki[a:], bias),
        right_kI=Columns.of(right_ki, bias),
        root_1I=None if whole.root_1I is None else own(whole.root_1I).contiguous(),
    )


def begin(prepared: PreparedShard, grad: AffineGradient, *, measure: bool) -> Half:
    """The first half; ``grad`` [o, D] or [O, i] float32, rows contiguous, is changed in place.

    Args:
        prepared: of `cut_prepared`; its room is used until `complete` has ended.
        grad: this rank's part; its bias [o] is that of ``prepared.bias_rows``.
        measure: whether the numbers for a norm rule are wanted.
    """
    own = prepared.own
    if not isinstance(own, ThinFactors):
        return _begin_units(own, grad, measure)
    whole_rows = prepared.side == "G"
    numbers = grad.weight_OD.new_zeros(2, dtype=torch.float64)
    if measure:
        numbers[0] = _square(grad)
    if own.root_1I is not None:
        scale_columns(grad, own.root_1I)
    weight_OD, bias_O = grad
    C_gO, Z_aO, E, V = own.C_gO, own.Z_aO, own.E_aI, own.V_gI
    torch.matmul(E.weight_D, weight_OD.mT, out=Z_aO)
    torch.matmul(C_gO, weight_OD, out=V.weight_D)
    start, stop = (0, Z_aO.shape[1]) if whole_rows else prepared.bias_rows
    if bias_O is not None:
        Z_aO[:, start:stop].addr_(E.last, bias_O)
        torch.mv(C_gO[:, start:stop], bias_O, out=V.last)
    if measure:
        numbers[1] = _weighted_rows(own, grad, (start, stop), whole_rows)
        if whole_rows:
            numbers[1] -= (own.row_O1.squeeze(-1) * _columns_squared(Z_aO)).sum()
        else:
            numbers[1] -= own.row_in_V * square_norm(V.weight_D)
    matrices = (V.all_I,) if whole_rows else (Z_aO, *(() if bias_O is None else (V.last,)))
    return Half((*matrices, numbers.float()) if measure else matrices, measure)


def complete(
    prepared: PreparedShard,
    grad: AffineGradient,
    half: Half,
    summed: Sequence[Tensor],
    *,
    square: bool = False,
) -> AppliedShard:
    """The second half: what is left is the norm rule, and the factor of the rows as in `finish`.

    Args:
        prepared, grad: as in `begin`, which returned ``half``.
        summed: the sums over the ranks of the addends, in their shapes.
        square: measure ‖P‖².
    """
    matrices = summed[:-1] if half.measured else summed
    grad_norm, inner = None, None
    if half.measured:
        grad_norm, inner = summed[-1][0].sqrt(), summed[-1][1].double()
    own = prepared.own
    if not isinstance(own, ThinFactors):
        return AppliedShard(None, grad_norm, _square(grad) if square else None, inner)
    C_gO, Z_aO, E, V, row_O1 = own.C_gO, own.Z_aO, own.E_aI, own.V_gI, own.row_O1
    weight_OD, bias_O = grad
    whole_rows = prepared.side == "G"
    start, stop = (0, Z_aO.shape[1]) if whole_rows else prepared.bias_rows
    if whole_rows:
        V.all_I.copy_(matrices[0])
        core_ga = V.all_I @ E.all_I.mT
        if inner is not None:
            inner = inner - own.row_in_V * (square_norm(V.all_I) - square_norm(core_ga))
    else:
        Z_aO.copy_(matrices[0])
        core_ga = C_gO @ Z_aO.mT
        if bias_O is not None:
            V.last.copy_(matrices[1])
        if inner is not None:
            inner = inner - (row_O1.squeeze(-1) * _columns_squared(Z_aO)).sum()
            inner = inner + own.row_in_V * square_norm(core_ga)
            if bias_O is not None:
                inner = inner - own.row_in_V * V.last.double().square().sum()
    subtract_product(V.all_I, core_ga, E.all_I)
    subtract_product(weight_OD, own.left_Ok, own.right_kI.weight_D)
    if bias_O is not None:
        bias_O.addmv_(own.left_Ok[start:stop], own.right_kI.last, alpha=-1)
    if own.root_1I is not None:
        scale_columns(grad, own.root_1I)
    if not whole_rows:
        # The bias has other rows than the weight: there is no one factor for `finish`.
        weight_OD.mul_(row_O1)
        if bias_O is not None:
            bias_O.mul_(_rows(row_O1, start, stop))
        return AppliedShard(None, grad_norm, _square(grad) if square else None, inner)
    norm_square = None
    if square:
        norm_square = row_norms(grad).mul_(row_O1.squeeze(-1)).double().square_().sum()
    return AppliedShard(row_O1, grad_norm, norm_square, inner)


def _begin_units(own: OneSidedInverse, grad: AffineGradient, measure: bool) -> Half:
    numbers = grad.weight_OD.new_zeros(2, dtype=torch.float64)
    if measure:
        numbers[0] = _square(grad)
    inner = apply(own, grad, inner=measure).inner
    if inner is not None:
        numbers[1] = inner
    return Half((numbers.float(),) if measure else (), measure)


def _weighted_rows(
    own: ThinFactors, grad: AffineGradient, bias_rows: Span, whole_rows: bool
) -> Tensor:
    """Σ row_o ‖x_o‖² over what this rank has of X, float64."""
    norms_O = row_norms(grad if whole_rows else grad._replace(bias_O=None))
    total = (own.row_O1.squeeze(-1) * norms_O.double().square_()).sum()
    if grad.bias_O is not None and not whole_rows:
        total = total + (_rows(own.row_O1, *bias_rows) * grad.bias_O.double().square()).sum()
    return total


def _rows(row_O1: Tensor, start: int, stop: int) -> Tensor:
    """The factors [stop - start] of some rows, or the [1] of all."""
    return row_O1[:, 0] if row_O1.shape[0] == 1 else row_O1[start:stop, 0]


def _columns_squared(Z_aO: Tensor) -> Tensor:
    """‖z_o‖² [O], float64."""
    norms_O: Tensor = torch.linalg.vector_norm(Z_aO, dim=-2)
    return norms_O.double().square_()


def _square(grad: AffineGradient) -> Tensor:
    """Sum of squares of what this rank has, float64."""
    total = square_norm(grad.weight_OD)
    return total if grad.bias_O is None else total + grad.bias_O.double().square().sum()
