"""PSGD: a preconditioner P = QᵀQ fitted to pairs of a step and the change of gradient it makes.

Li 2018, "Preconditioned stochastic gradient descent": of all positive definite P, the one that
minimises E[δgᵀ P δg + δxᵀ P⁻¹ δx] has P E[δg δgᵀ] P = E[δx δxᵀ]: preconditioned changes of the
gradient have the size of the steps that made them.  With δg = H δx and δx ~ N(0, I) it is |H|⁻¹.
Q is upper triangular and follows the relative (natural) gradient

    Q ← Q − μ triu(a aᵀ − b bᵀ) Q,   a = Q δg,   b = Q⁻ᵀ δx

where μ is a step divided by the largest entry.  For a matrix of parameters g [O, I] there are two,
P g = LᵀL g RᵀR, and each follows its own.  A factor is a triangle [d, d] or, where that is too
large or means nothing, a diagonal [d]; its diagonal stays positive as long as the step is below 1.

Shape suffixes: n numbers of a vector, O rows and I columns of a matrix, d a factor's dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import solve_triangular

_TINY = 1.2e-38  # the smallest normal float32


class Factors(NamedTuple):
    """Q of a matrix of parameters [O, I]: ``left`` [O, O] or [O], ``right`` [I, I] or [I]."""

    left: Tensor
    right: Tensor


def fit(q: Tensor, dx_n: Tensor, dg_n: Tensor, step: float) -> Tensor:
    """One step of Q, triangle [n, n] or diagonal [n], towards the fit of one pair.

    Args:
        q: the factor.
        dx_n: a step of the parameters.
        dg_n: the change of the gradient that belongs to it.
        step: relative size of the largest change, 0 < step < 1.

    Returns:
        the new Q; the old one where numbers were not finite.
    """
    a_n = _times(q, dg_n.unsqueeze(1)).squeeze(1)
    b_n = _solved(q, dx_n.unsqueeze(1)).squeeze(1)
    if q.dim() == 1:
        return _finite_or(q, _stepped(q, a_n.square() - b_n.square(), step))
    largest = torch.triu(torch.outer(a_n, a_n) - torch.outer(b_n, b_n)).abs().max()
    # triu(a aᵀ) Q is a ∘ (sums over the rows from i on of a ∘ Q): n² operations, not n³.
    change_nn = _triangle_times(a_n, q) - _triangle_times(b_n, q)
    return _finite_or(q, q - step / (largest + _TINY) * change_nn)


def fit_factors(factors: Factors, dx_OI: Tensor, dg_OI: Tensor, step: float) -> Factors:
    """The same for a matrix of parameters; both factors keep their values together where numbers
    were not finite."""
    # P does not depend on how the scale is shared out; the two should not drift apart.
    ratio = (_diagonal(factors.left).max() / _diagonal(factors.right).max()).sqrt()
    left, right = factors.left / ratio, factors.right * ratio
    a_OI, b_OI = _whitened(Factors(left, right), dx_OI, dg_OI)
    new = Factors(
        _stepped(left, _relative_gradient(left, a_OI, b_OI), step),
        _stepped(right, _relative_gradient(right, a_OI.mT, b_OI.mT), step),
    )
    fits = torch.isfinite(new.left).all() & torch.isfinite(new.right).all()
    return Factors(*(torch.where(fits, n, o) for n, o in zip(new, factors, strict=True)))


def apply(q: Tensor, g_n: Tensor) -> Tensor:
    """P g = QᵀQ g, [n]."""
    if q.dim() == 1:
        return q.square() * g_n
    return q.mT @ (q @ g_n)


def apply_factors(factors: Factors, g_OI: Tensor) -> Tensor:
    """P g = LᵀL g RᵀR, [O, I]."""
    left, right = factors
    g_OI = left.square().unsqueeze(1) * g_OI if left.dim() == 1 else left.mT @ (left @ g_OI)
    return g_OI * right.square() if right.dim() == 1 else (g_OI @ right.mT) @ right


def criterion(q: Tensor, dx_n: Tensor, dg_n: Tensor) -> Tensor:
    """δgᵀ P δg + δxᵀ P⁻¹ δx of one pair, a scalar."""
    return (
        _times(q, dg_n.unsqueeze(1)).square().sum() + _solved(q, dx_n.unsqueeze(1)).square().sum()
    )


def criterion_factors(factors: Factors, dx_OI: Tensor, dg_OI: Tensor) -> Tensor:
    """The same for a matrix of parameters."""
    a_OI, b_OI = _whitened(factors, dx_OI, dg_OI)
    return a_OI.square().sum() + b_OI.square().sum()


def _whitened(factors: Factors, dx_OI: Tensor, dg_OI: Tensor) -> tuple[Tensor, Tensor]:
    """L δg Rᵀ and L⁻ᵀ δx R⁻¹."""
    left, right = factors
    return _times(left, _times(right, dg_OI.mT).mT), _solved(left, _solved(right, dx_OI.mT).mT)


def _times(q: Tensor, x: Tensor) -> Tensor:
    return q.unsqueeze(1) * x if q.dim() == 1 else q @ x


def _solved(q: Tensor, x: Tensor) -> Tensor:
    """Q⁻ᵀ x."""
    return x / q.unsqueeze(1) if q.dim() == 1 else solve_triangular(q.mT, x, upper=False)


def _diagonal(q: Tensor) -> Tensor:
    return q if q.dim() == 1 else q.diagonal()


def _relative_gradient(q: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if q.dim() == 1:
        return a.square().sum(1) - b.square().sum(1)
    return torch.triu(a @ a.mT - b @ b.mT)


def _stepped(q: Tensor, gradient: Tensor, step: float) -> Tensor:
    change = gradient * q if q.dim() == 1 else gradient @ q
    return q - step / (gradient.abs().max() + _TINY) * change


def _triangle_times(v_n: Tensor, q_nn: Tensor) -> Tensor:
    """triu(v vᵀ) Q."""
    column_n1 = v_n.unsqueeze(1)
    return column_n1 * (column_n1 * q_nn).flip(0).cumsum(0).flip(0)


def _finite_or(old: Tensor, new: Tensor) -> Tensor:
    return torch.where(torch.isfinite(new).all(), new, old)
