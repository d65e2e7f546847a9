"""P = G⁻¹ ∇W A⁻¹ written over ∇W itself: the one thing K-FAC does at every training step.

With both inverses in low-rank form, nothing of the gradient's size is allocated, and it is passed
over four times, or six with a norm rule. With G⁻¹ = row ∘ (I − B Cᵀ) and
A⁻¹ = root ∘ (I − E Eᵀ) ∘ root,

    P = row ∘ (X − [Z | B] [Eᵀ ; V − (CᵀZ) Eᵀ]) ∘ root,   X = ∇W ∘ root, Z = X E, V = CᵀX:

two thin products, one that subtracts them both, and the row scaling that waits until the norm rule
is known, whose factor goes into it. Where a diagonal is a multiple of the identity, it all goes
into ``row`` (then B = C, and ``root`` is none).

⟨∇W, P⟩ comes from the same thin products: with w the product of those of the two diagonals that
are multiples of the identity,

    ⟨∇W, P⟩ = Σ_o row_o (‖x_o‖² − ‖z_o‖²) − w (‖V‖² − ‖CᵀZ‖²),

summed in float64; thin products in float32 leave an error of about 1e-7 · max(row) ‖X‖².

Shape suffixes, after any number of leading batch dimensions: O output features, I input features
(with the bias coordinate), D input features without it, g, a ranks of sides G and A, k = a + g.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distcurv.curvature.inverse import DenseInverse, Inverse, LowRankInverse, apply_sides
from distcurv.curvature.one_sided import OneSidedInverse, UnitInverse, WholeInverse, multiply_units
from distcurv.errors import ShapeError


class AffineGradient(NamedTuple):
    """∇W as it lies in memory: the weight's part and, where the block has one, the bias column.

    With batch dimensions the bias is part of the weight, [..., O, I], and ``bias_O`` is None."""

    weight_OD: Tensor
    bias_O: Tensor | None

    def whole(self) -> Tensor:
        """[..., O, I]; a copy where there is a bias."""
        if self.bias_O is None:
            return self.weight_OD
        return torch.cat([self.weight_OD, self.bias_O.unsqueeze(-1)], -1)


class Columns(NamedTuple):
    """A matrix [..., I] and views of it that meet the parts of an `AffineGradient`."""

    all_I: Tensor
    weight_D: Tensor
    last: Tensor  # the bias column, where there is a bias

    @classmethod
    def of(cls, all_I: Tensor, bias: bool) -> Columns:
        """The last column is apart where there is a bias."""
        # (A rank's part may have no column at all.)
        return cls(all_I, all_I[..., :-1] if bias else all_I, all_I[..., -1:].squeeze(-1))


class ThinFactors(NamedTuple):
    """Two low-rank inverses laid out for `apply`, with room for what an apply makes.

    Two tensors, [Zᵀ ; Bᵀ] and [Eᵀ ; V], of which the room for Z and V and all else are views.
    """

    Z_aO: Tensor
    left_Ok: Tensor
    E_aI: Columns
    V_gI: Columns
    right_kI: Columns
    C_gO: Tensor  # Cᵀ; a view of left_Ok where B = C
    row_O1: Tensor  # [..., 1, 1] where it is one number
    root_1I: Tensor | None
    row_in_V: Tensor  # w [...]


class DenseSides(NamedTuple):
    """Inverses of which at least one is a matrix: these need a temporary of the gradient's size."""

    inverse_G: Inverse
    inverse_A: Inverse

    def times(self, grad_OI: Tensor) -> Tensor:
        """P [..., O, I]."""
        return apply_sides(self.inverse_G, self.inverse_A, grad_OI)


Prepared = ThinFactors | DenseSides | OneSidedInverse | WholeInverse


class Applied(NamedTuple):
    """What `apply` leaves to be done and, where asked for, what it measured, [...]."""

    row_O1: Tensor | None  # what the rows are still to be multiplied with
    grad_norm: Tensor | None  # ‖∇W‖
    norm: Tensor | None  # ‖P‖
    inner: Tensor | None  # ⟨∇W, P⟩, float64


def prepare_block(
    inverses: Sequence[Inverse | OneSidedInverse | WholeInverse], *, bias: bool
) -> Prepared:
    """`prepare` of what `Kind.inverses` yields: sides A and G, or one for the whole block.

    Raises `ShapeError` for one side that is not the inverse of a one-sided kind."""
    if len(inverses) == 1:
        (inverse_F,) = inverses
        if isinstance(inverse_F, DenseInverse) or (
            isinstance(inverse_F, LowRankInverse) and inverse_F.W_dr.shape[-1] > 0
        ):
            raise ShapeError(
                "a block with one side has the inverse of a Kronecker side: use the kind "
                "'diagonal' or 'unitwise' for it, or give the block two sides"
            )
        return inverse_F
    inverse_A, inverse_G = inverses
    whole = UnitInverse | WholeInverse
    if isinstance(inverse_A, whole) or isinstance(inverse_G, whole):
        raise ShapeError("a unit-wise inverse is that of a whole block, not one of two sides")
    return prepare(inverse_G, inverse_A, bias=bias)


def prepare(inverse_G: Inverse, inverse_A: Inverse, *, bias: bool) -> ThinFactors | DenseSides:
    """Lay out a block's inverses, once for each version: k(O + I) + g·O numbers.

    Args:
        inverse_G, inverse_A: with at most one batch dimension.
        bias: whether the gradients will have their bias column apart.
    """
    if not isinstance(inverse_G, LowRankInverse) or not isinstance(inverse_A, LowRankInverse):
        return DenseSides(inverse_G, inverse_A)
    W_Og, W_Ia = inverse_G.W_dr, inverse_A.W_dr
    (O, g), (I, a) = W_Og.shape[-2:], W_Ia.shape[-2:]  # noqa: E741
    batch = W_Og.shape[:-2]
    left_kO, right_kI = room(W_Og, *batch, a + g, O), room(W_Ia, *batch, a + g, I)
    root = inverse_A.inv_diag.sqrt()
    right_kI[..., :a, :] = (W_Ia / root.unsqueeze(-1)).mT
    row_O1 = inverse_G.inv_diag.unsqueeze(-1)
    B_gO = left_kO[..., a:, :]
    row_in_V = torch.ones_like(root[..., 0])
    if row_O1.shape[-2] == 1:
        B_gO.copy_((W_Og / row_O1.sqrt()).mT)
        C_gO = B_gO
        row_in_V = row_O1[..., 0, 0]
    else:
        B_gO.copy_((W_Og / row_O1).mT)
        C_gO = W_Og.mT.contiguous()
    root_1I: Tensor | None = root.unsqueeze(-2)
    if root.shape[-1] == 1:
        scale = inverse_A.inv_diag
        row_O1, row_in_V, root_1I = row_O1 * scale.unsqueeze(-1), row_in_V * scale[..., 0], None
    return ThinFactors(
        Z_aO=left_kO[..., :a, :],
        left_Ok=left_kO.mT,
        E_aI=Columns.of(right_kI[..., :a, :], bias),
        V_gI=Columns.of(right_kI[..., a:, :], bias),
        right_kI=Columns.of(right_kI, bias),
        C_gO=C_gO,
        row_O1=row_O1,
        root_1I=root_1I,
        row_in_V=row_in_V,
    )


def apply(
    prepared: Prepared, grad: AffineGradient, *, norms: bool = False, inner: bool = False
) -> Applied:
    """Write P, but for the factors of its rows that `finish` multiplies with, over ``grad``.

    Tensor operations alone. What has the size of the gradient is changed in place; ``prepared``'s
    room is overwritten, so one `Prepared` serves one gradient at a time. On devices that round
    products to less than float32 unless told otherwise, call it inside `full_float32`.

    Args:
        prepared: of `prepare` or `prepare_block`; its dtype is the gradient's.
        grad: rows contiguous; a bias where ``prepare`` was told so.
        norms: measure ‖∇W‖ and ‖P‖.
        inner: measure ⟨∇W, P⟩.
    """
    if isinstance(prepared, DenseSides | WholeInverse):
        return _apply_dense(prepared, grad, norms, inner)
    if not isinstance(prepared, ThinFactors):
        return _apply_one_sided(prepared, grad, norms, inner)
    Z_aO, left_Ok, E, V, right, C_gO, row_O1, root_1I, row_in_V = prepared
    weight_OD, bias_O = grad
    grad_norm = norm_of_rows(row_norms(grad)) if norms else None
    if root_1I is not None:
        scale_columns(grad, root_1I)
    x_O = row_norms(grad) if inner else None

    torch.matmul(E.weight_D, weight_OD.mT, out=Z_aO)
    torch.matmul(C_gO, weight_OD, out=V.weight_D)
    if bias_O is not None:
        Z_aO.addr_(E.last, bias_O)
        torch.mv(C_gO, bias_O, out=V.last)
    core_ga = C_gO @ Z_aO.mT
    product = None
    if x_O is not None:
        z_O = torch.linalg.vector_norm(Z_aO, dim=-2)
        outside_O = x_O.double().square_() - z_O.double().square_()
        in_V = square_norm(V.all_I) - square_norm(core_ga)
        product = (row_O1.squeeze(-1) * outside_O).sum(-1) - row_in_V * in_V
    subtract_product(V.all_I, core_ga, E.all_I)
    subtract_product(weight_OD, left_Ok, right.weight_D)
    if bias_O is not None:
        bias_O.addmv_(left_Ok, right.last, alpha=-1)

    if root_1I is not None:
        scale_columns(grad, root_1I)
    norm = norm_of_rows(row_norms(grad).mul_(row_O1.squeeze(-1))) if norms else None
    return Applied(row_O1, grad_norm, norm, product)


def finish(grad: AffineGradient, row_O1: Tensor | None, scale: Tensor | None) -> None:
    """Multiply the rows by ``row_O1`` and everything by ``scale`` [...] or [], in one pass."""
    if scale is not None and scale.dim():
        scale = scale[..., None, None]
    factor_O1 = scale if row_O1 is None else row_O1
    if factor_O1 is None:
        return
    if row_O1 is not None and scale is not None:
        factor_O1 = row_O1 * scale
    grad.weight_OD.mul_(factor_O1)
    if grad.bias_O is not None:
        grad.bias_O.mul_(factor_O1.squeeze(-1) if factor_O1.dim() else factor_O1)


def _apply_dense(
    prepared: DenseSides | WholeInverse, grad: AffineGradient, norms: bool, inner: bool
) -> Applied:
    grad_OI = grad.whole()
    direction_OI = prepared.times(grad_OI)
    grad_norm = norm_of_rows(torch.linalg.vector_norm(grad_OI, dim=-1)) if norms else None
    norm = norm_of_rows(torch.linalg.vector_norm(direction_OI, dim=-1)) if norms else None
    product = (grad_OI.double() * direction_OI).sum((-2, -1)) if inner else None
    D = grad.weight_OD.shape[-1]
    grad.weight_OD.copy_(direction_OI[..., :D])
    if grad.bias_O is not None:
        grad.bias_O.copy_(direction_OI[..., D])
    return Applied(None, grad_norm, norm, product)


def _apply_one_sided(
    inverse: OneSidedInverse, grad: AffineGradient, norms: bool, inner: bool
) -> Applied:
    measured = norms or inner
    before = grad.whole().clone() if measured else grad.weight_OD
    multiply_units(inverse, grad.weight_OD, grad.bias_O)
    after = grad.whole() if measured else grad.weight_OD
    return Applied(
        None,
        norm_of_rows(torch.linalg.vector_norm(before, dim=-1)) if norms else None,
        norm_of_rows(torch.linalg.vector_norm(after, dim=-1)) if norms else None,
        (before.double() * after).sum((-2, -1)) if inner else None,
    )


def room(like: Tensor, *shape: int) -> Tensor:
    """An empty tensor whose rows begin at multiples of 16 numbers: products are faster then."""
    return like.new_empty(*shape[:-1], -(-shape[-1] // 16) * 16)[..., : shape[-1]]


def row_norms(grad: AffineGradient) -> Tensor:
    """[..., O]."""
    norms_O: Tensor = torch.linalg.vector_norm(grad.weight_OD, dim=-1)
    return norms_O if grad.bias_O is None else norms_O.hypot_(grad.bias_O)


def norm_of_rows(norms_O: Tensor) -> Tensor:
    """[...], from the norms of the rows: a sum over all entries at once would err more."""
    norm: Tensor = torch.linalg.vector_norm(norms_O, dim=-1)
    return norm


def square_norm(matrix: Tensor) -> Tensor:
    """‖matrix‖², [...] in float64."""
    rows: Tensor = torch.linalg.vector_norm(matrix, dim=-1).double().square_()
    return rows.sum(-1)


def scale_columns(grad: AffineGradient, factor_1I: Tensor) -> None:
    D = grad.weight_OD.shape[-1]
    grad.weight_OD.mul_(factor_1I[..., :D])
    if grad.bias_O is not None:
        grad.bias_O.mul_(factor_1I[..., 0, D:])


def subtract_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out −= left @ right without a temporary of out's size; at most one batch dimension."""
    if out.dim() == 2:
        out.addmm_(left, right, alpha=-1)
    else:
        out.baddbmm_(left, right, alpha=-1)
