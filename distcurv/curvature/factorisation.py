"""The factorisations that can fail to converge, with our error instead of PyTorch's.

Both run in float64, so there is no better arithmetic left to try.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distcurv.errors import NumericsError

# Public, but exported in a way that type checkers do not see.
_LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]


def left_singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors [..., m, k] and values [..., k], descending, of [..., m, n] in float64.

    k = min(m, n).  Raises `NumericsError` where the iteration does not converge, or ``matrix`` is
    not finite.
    """
    try:
        P, sigma, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    except _LinAlgError as error:
        raise NumericsError(
            f"SVD of a {tuple(matrix.shape)} matrix failed in float64: {error}"
        ) from error
    if not bool(torch.isfinite(sigma).all()):
        raise NumericsError(f"SVD of a {tuple(matrix.shape)} matrix met NaN or infinite entries")
    return P, sigma


def eigh_ascending(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., d], ascending, and eigenvectors [..., d, d] of a symmetric matrix.

    In float64.  Raises `NumericsError` where the iteration does not converge.
    """
    try:
        lam, U = torch.linalg.eigh(matrix.double())
    except _LinAlgError as error:
        raise NumericsError(
            f"eigh of a {tuple(matrix.shape)} matrix failed in float64: {error}"
        ) from error
    return lam, U


def eigh_descending(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors [..., d, d] and eigenvalues [..., d], descending; else as `eigh_ascending`."""
    lam, U = eigh_ascending(matrix)
    return U.flip(-1), lam.flip(-1)
