"""A Kronecker side by the rows it is made of, as long as these are fewer than its dimensions.

With R [n, d] and n < d, (RᵀR + λI)⁻¹ = (I − Wᵀ W)/λ, W = L⁻¹R, L Lᵀ = λI + RRᵀ: an inverse of size
n instead of d (Woodbury). It is the same matrix as that of dense factors.

Source: Tang et al. 2021, "SKFAC: Training Neural Networks with Faster Kronecker-Factored
Approximate Curvature", section 3.

Shape suffixes: n rows, d the side's dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distcurv.curvature.inverse import DenseInverse, Inverse, LowRankInverse
from distcurv.errors import NumericsError


def side_of_rows(rows_nd: Tensor) -> Tensor:
    """RᵀR as rows where there are fewer than d, else as the matrix [d, d]; float64."""
    rows_nd = rows_nd.double()
    n, d = rows_nd.shape
    return rows_nd if n < d else rows_nd.mT @ rows_nd


def is_matrix(side: Tensor) -> bool:
    """Whether a side is held as the matrix [d, d], not as n < d rows."""
    return side.shape[0] == side.shape[1]


def averaged(old: Tensor, old_share: float, new: Tensor, new_share: float) -> Tensor:
    """a · old + b · new for two sides in either form, again in one of them; copies."""
    if old_share == 0.0:
        return new * (new_share if is_matrix(new) else new_share**0.5)
    if is_matrix(old) or is_matrix(new):
        return old_share * _matrix(old) + new_share * _matrix(new)
    return side_of_rows(torch.cat([old_share**0.5 * old, new_share**0.5 * new]))


def trace_of_side(side: Tensor) -> Tensor:
    """tr RᵀR."""
    return side.diagonal().sum() if is_matrix(side) else side.square().sum()


def invert_side(side: Tensor, damping: Tensor, dtype: torch.dtype) -> Inverse:
    """(RᵀR + λI)⁻¹ for λ > 0.

    Raises `NumericsError` where it is not positive definite in float64."""
    if is_matrix(side):
        damped_dd = side + damping * torch.eye(len(side), dtype=side.dtype, device=side.device)
        return DenseInverse(torch.cholesky_inverse(_cholesky(damped_dd)).to(dtype))
    gram_nn = side @ side.mT
    gram_nn.diagonal().add_(damping)
    W_nd = torch.linalg.solve_triangular(_cholesky(gram_nn), side, upper=False)
    inv_diag_1 = (1.0 / damping).reshape(1)
    return LowRankInverse(inv_diag_1.to(dtype), (W_nd.mT / damping.sqrt()).to(dtype))


def _matrix(side: Tensor) -> Tensor:
    return side if is_matrix(side) else side.mT @ side


def _cholesky(matrix: Tensor) -> Tensor:
    chol: Tensor
    chol, info = torch.linalg.cholesky_ex(matrix)
    if bool(info > 0):
        raise NumericsError(
            "a damped factor is not positive definite in float64: raise the damping"
        )
    return chol
