"""Natural gradients of a Fisher matrix given by few rows: (RᵀR + λI)⁻¹ g without forming it.

By the identity of Sherman, Morrison and Woodbury all that is solved has the size of K = R Rᵀ, one
row and column for each sample.  Solved in float64: K + λI of a small λ is ill-conditioned, and the
systems are small.

Letters: n rows (samples), P parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distcurv.errors import NumericsError


def within_span(kernel_nn: Tensor, weights_n: Tensor, damping: float) -> Tensor:
    """c with (RᵀR + λI)⁻¹ Rᵀ w = Rᵀ c: c = (K + λI)⁻¹ w, float64 [n].

    For a gradient that is a combination of the rows.  Nothing cancels, whatever λ is.

    Raises `NumericsError` where K + λI is not positive definite in float64."""
    return _solve(_factor(kernel_nn, damping), weights_n)


def damped_factor(kernel_nn: Tensor, damping: float) -> Tensor:
    """The Cholesky factor of K + λI, float64 [n, n], for `beyond_span`; raises as `within_span`."""
    return _factor(kernel_nn, damping)


def beyond_span(factor_nn: Tensor, products_n: Tensor) -> Tensor:
    """c with (RᵀR + λI)⁻¹ g = (g − Rᵀ c)/λ, for products R g of any g: c = (K + λI)⁻¹ R g,
    float64 [n]."""
    return _solve(factor_nn, products_n)


def _factor(kernel_nn: Tensor, damping: float) -> Tensor:
    damped = kernel_nn.double()
    damped = (damped + damped.mT) / 2 + damping * torch.eye(
        len(damped), dtype=torch.float64, device=damped.device
    )
    factor, info = torch.linalg.cholesky_ex(damped)
    if info.any() or not factor.isfinite().all():
        raise NumericsError(
            f"the {len(damped)} samples' kernel + {damping:g} is not positive definite: non-finite "
            "gradients, or a damping that is too small"
        )
    found: Tensor = factor
    return found


def _solve(factor_nn: Tensor, rhs_n: Tensor) -> Tensor:
    return torch.cholesky_solve(rhs_n.double().unsqueeze(-1), factor_nn).squeeze(-1)
