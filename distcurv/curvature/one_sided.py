"""Blocks that are no Kronecker product: inverses of the block as a whole, and their products.

A unit is a parameter on its own (the inverse is a diagonal) or the weight and the bias of one
channel, whose second moments are a 2 x 2 matrix M. Source: Amari, Karakida and Oizumi 2019, "Fisher
Information and Natural Gradient Learning in Random Deep Networks" (unit-wise natural gradient). Or
the block has matrices of any size on its diagonal, or a diagonal in a Kronecker product of bases.

Shape suffixes, after any number of leading batch dimensions: d units; u matrices of dimension m;
O output features, I input features (with the bias coordinate).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distcurv.curvature.inverse import FLOOR, LowRankInverse
from distcurv.errors import ShapeError


class UnitInverse(NamedTuple):
    """One symmetric matrix [[ww, wb], [wb, bb]] for each unit, [..., d] each."""

    ww_d: Tensor
    wb_d: Tensor
    bb_d: Tensor

    def dense(self) -> Tensor:
        """The matrices [..., d, 2, 2]."""
        rows = [torch.stack([self.ww_d, self.wb_d], -1), torch.stack([self.wb_d, self.bb_d], -1)]
        return torch.stack(rows, -2)


class MatricesInverse(NamedTuple):
    """One symmetric matrix for each of u equal parts of the gradient, [..., u, m, m]."""

    matrices_umm: Tensor

    def dense(self) -> Tensor:
        """The matrices [..., u, m, m]."""
        return self.matrices_umm

    def times(self, grad_OI: Tensor) -> Tensor:
        """The product with the numbers of a gradient [..., O, I], O I = u m, row by row."""
        u, m = self.matrices_umm.shape[-3:-1]
        parts_um1 = grad_OI.reshape(*grad_OI.shape[:-2], u, m, 1)
        return (self.matrices_umm @ parts_um1).reshape(grad_OI.shape)


class EigenbasisInverse(NamedTuple):
    """X -> U_G [(U_Gᵀ X U_A) ∘ D] U_Aᵀ."""

    U_OO: Tensor
    U_II: Tensor
    diagonal_OI: Tensor  # D

    def dense(self) -> Tensor:
        """The matrix [..., O I, O I] that multiplies the rows of X one after the other."""
        O, I = self.diagonal_OI.shape[-2:]  # noqa: E741
        basis = torch.einsum("...op,...ij->...oipj", self.U_OO, self.U_II)
        basis = basis.reshape(*basis.shape[:-4], O * I, O * I)
        return (basis * self.diagonal_OI.flatten(-2).unsqueeze(-2)) @ basis.mT

    def times(self, grad_OI: Tensor) -> Tensor:
        """The product with a gradient [..., O, I]."""
        inside_OI = self.U_OO.mT @ grad_OI @ self.U_II
        return self.U_OO @ (inside_OI * self.diagonal_OI) @ self.U_II.mT


WholeInverse = MatricesInverse | EigenbasisInverse  # a matrix is needed for its product
OneSidedInverse = LowRankInverse | UnitInverse


def invert_units(ww_d: Tensor, wb_d: Tensor, bb_d: Tensor, damping: Tensor) -> UnitInverse:
    """(M + damping · I)⁻¹ of every unit, with no eigenvalue of M + damping · I taken below `FLOOR`
    times the largest of any unit's M.

    With the eigenvalues m ± h of M and D± what stands for m ± h + damping, the inverse is
    I (1/D₊ + 1/D₋)/2 − (M − m I) s/(D₊ D₋), s = (D₊ − D₋)/(2 h): 1 where nothing is cut off.
    Float64 throughout; the result has the dtype of ``ww_d``.

    Args:
        ww_d, wb_d, bb_d: the entries of M, positive semidefinite but for rounding. Where there is
            no bias wb = bb = 0, and the result's ww is 1/(ww + damping).
        damping: [...] ≥ 0. Where it and all of the block are zero the inverse is the identity.
    """
    ww64_d, wb64_d, bb64_d = ww_d.double(), wb_d.double(), bb_d.double()
    mean_d, half_d = (ww64_d + bb64_d) / 2, (ww64_d - bb64_d) / 2
    h_d = torch.hypot(half_d, wb64_d)
    floor_1 = FLOOR * (mean_d + h_d).amax(-1, keepdim=True)
    damped_d = mean_d + damping.double().unsqueeze(-1)
    large_d, small_d = (
        torch.maximum(damped_d + h_d, floor_1),
        torch.maximum(damped_d - h_d, floor_1),
    )
    large_d, small_d = (torch.where(D_d > 0, D_d, 1.0) for D_d in (large_d, small_d))
    level_d = (1 / large_d + 1 / small_d) / 2
    # Where h is rounding beside the mean so is the ratio, which then multiplies about nothing.
    ratio_d = torch.where(h_d > 0, (large_d - small_d) / (2 * h_d), 0.0).clamp(max=1.0)
    turn_d = ratio_d / large_d / small_d
    inverse = UnitInverse(level_d - half_d * turn_d, -wb64_d * turn_d, level_d + half_d * turn_d)
    return UnitInverse(*(entry_d.to(ww_d.dtype) for entry_d in inverse))


def multiply_units(inverse: OneSidedInverse, weight_d1: Tensor, bias_d: Tensor | None) -> None:
    """Multiply the gradient with the inverse, in place.

    Args:
        inverse: of the dtype of the gradient; a diagonal has no W.
        weight_d1: [..., d, 1]; or [..., d, 2] where the bias is its second column.
        bias_d: [..., d], or None. With neither only ww counts.

    Raises:
        ShapeError: the gradient does not fit, or a diagonal meets a gradient with a bias.
    """
    units = inverse.inv_diag if isinstance(inverse, LowRankInverse) else inverse.ww_d
    columns = weight_d1.shape[-1] + (bias_d is not None)
    most = 1 if isinstance(inverse, LowRankInverse) else 2
    if weight_d1.shape[:-1] != units.shape or not 1 <= columns <= most:
        raise ShapeError(
            f"the gradient of a block of {units.shape[-1]} units has a weight of shape "
            f"{tuple(weight_d1.shape)} and {'a' if bias_d is not None else 'no'} bias: "
            f"{tuple(units.shape)} with {'one column' if most == 1 else 'one or two columns'} fits"
        )
    if isinstance(inverse, LowRankInverse):
        weight_d1.mul_(units.unsqueeze(-1))
        return
    if columns == 1:
        weight_d1.mul_(units.unsqueeze(-1))
        return
    weight_d = weight_d1[..., 0]
    if bias_d is None:
        bias_d = weight_d1[..., 1]
    new_weight_d = inverse.ww_d * weight_d + inverse.wb_d * bias_d
    bias_d.mul_(inverse.bb_d).addcmul_(inverse.wb_d, weight_d)
    weight_d.copy_(new_weight_d)
