"""Leading eigenpairs one after the other: power iteration with deflation, the plain reference.

The low-rank K-FAC report's form: iterate v ← M v / ‖M v‖ until it stands, take λ = vᵀ M v, subtract
λ v vᵀ, begin again. The service does not run it: `distcurv.curvature.power` turns all r vectors at
once and continues from the previous version, with ``max_itr`` and ``tolerance`` of `KfacConfig`; a
sketch is finished in a single pass (`distcurv.curvature.nystrom`). Where the spectrum has gaps all
of them find the same subspace.

Source: Golub and Van Loan 2013, "Matrix Computations", section 7.3.1.

Shape suffixes: d dimension, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distcurv.curvature.nystrom import Eigenpairs
from distcurv.errors import ConfigError, ShapeError


def deflated_eigenpairs(
    M_dd: Tensor, start_dr: Tensor, *, max_itr: int = 1000, tolerance: float = 1e-9
) -> Eigenpairs:
    """The r leading eigenpairs of a symmetric positive semidefinite matrix, float64.

    Args:
        M_dd: [d, d].
        start_dr: where each vector begins [d, r], not zero.
        max_itr: at most so many products for each vector.
        tolerance: a vector stands where it moves by less, ‖v_new − v‖.

    Returns:
        U with orthonormal columns, lam descending but for ties.

    Raises `ConfigError` for ``max_itr`` < 1 or a negative tolerance, `ShapeError` for shapes that
    do not fit.
    """
    if max_itr < 1 or not tolerance >= 0:
        raise ConfigError(f"max_itr is {max_itr}, tolerance {tolerance}: give >= 1 and >= 0")
    d, r = start_dr.shape if start_dr.dim() == 2 else (0, 0)
    if M_dd.shape != (d, d) or not 0 < r <= d:
        raise ShapeError(
            f"deflated_eigenpairs got a matrix {tuple(M_dd.shape)} and a start "
            f"{tuple(start_dr.shape)}: give [d, d] and [d, r] with r <= d"
        )
    rest_dd = M_dd.double().clone()
    found: list[Tensor] = []
    values: list[Tensor] = []
    for column in start_dr.double().unbind(1):
        v_d = _normal(_without(column, found))
        for _ in range(max_itr):
            # What rounding brings back of the vectors before would grow again.
            next_d = _without(rest_dd @ v_d, found)
            size = torch.linalg.vector_norm(next_d)
            if size == 0:
                break
            next_d = next_d / size
            moved = torch.linalg.vector_norm(next_d - v_d)
            v_d = next_d
            if moved < tolerance:
                break
        lam = v_d @ rest_dd @ v_d
        rest_dd -= lam * torch.outer(v_d, v_d)
        found.append(v_d)
        values.append(lam)
    return Eigenpairs(torch.stack(found, 1), torch.stack(values))


def _without(v_d: Tensor, found: list[Tensor]) -> Tensor:
    for u_d in found:
        v_d = v_d - (u_d @ v_d) * u_d
    return v_d


def _normal(v_d: Tensor) -> Tensor:
    normal_d: Tensor = v_d / torch.linalg.vector_norm(v_d)
    return normal_d
