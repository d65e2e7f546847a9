"""The four-block eigenvalue correction: fresh second moments over a stale low-rank basis.

Why this file exists: a basis that arrives from a worker is many steps old. That is harmless as long
as the *scales* along it are fresh, so the training ranks keep Adam's second moment themselves and
update it at every step, in the coordinates of the installed basis. With only r directions a side
the gradient falls into four orthogonal parts, each with a second moment of its own:

    core   C = U_Gᵀ X U_A          g×a   elementwise second moment
    right  R = X U_A − U_G C       O×a   elementwise
    left   L = U_Gᵀ X − C U_Aᵀ     g×I   elementwise
    rest   what remains            O×I   one scalar v₃: EMA of its mean square

At full rank on both sides only the core is left and the rule is SOAP (Vyas et al. 2024, "SOAP:
Improving and Stabilizing Shampoo using Adam", Algorithm 3); the core and the sides are the
eigenvalue correction of George et al. 2018 ("Fast Approximate Natural Gradient Descent in a
Kronecker-factored Eigenbasis", eq. 12) with momentum and Adam's bias corrections.

Shape suffixes, after any number of leading batch dimensions (blocks of one shape may be stacked):
O output features, I input features, g rank of the output basis U_G, a rank of the input basis U_A.

A part that cannot hold anything is dropped, not carried as rounding noise: the right part and the
rest where g = O, the left part and the rest where a = I. Dropped parts are tensors with 0 elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distcurv.curvature.direction import Direction
from distcurv.curvature.four_block_parts import (
    Parts,
    Projections,
    check_bases,
    rest_energy,
    split,
)
from distcurv.errors import ShapeError

# v₃ is read as at least this share of the mean second moment over all entries. Without it a rest
# that is empty but for rounding is divided by its own noise and the step diverges in float32.
REST_FLOOR = 1e-4


class FourBlockState(NamedTuple):
    """All that `update` carries from step to step; flat, so that it can be saved field by field.

    float32 (float64 where the gradients are). The momentum must not be kept narrower: the
    direction holds a difference of M/√v₃ and its projections.
    """

    momentum_OI: Tensor  # EMA of the gradient, β₁, not bias corrected
    core_ga: Tensor  # parts of the momentum in the installed basis
    right_Oa: Tensor
    left_gI: Tensor
    v_core_ga: Tensor  # EMAs of the squared parts of the gradient, β₂, not bias corrected
    v_right_Oa: Tensor
    v_left_gI: Tensor
    v_rest: Tensor  # [...]: EMA of the mean square of the rest; 0 where there is no rest

    @property
    def moments(self) -> Parts:
        """The elementwise second moments, in the order of `Parts`."""
        return Parts(self.v_core_ga, self.v_right_Oa, self.v_left_gI)


def init_state(
    shape: Sequence[int],
    rank_out: int,
    rank_in: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> FourBlockState:
    """The state before the first update: momentum and moments zero, hence valid in any basis.

    Args:
        shape: [..., O, I], the shape of the gradient, leading batch dimensions first.
        rank_out: g, columns of the output basis, 1 ≤ g ≤ O.
        rank_in: a, columns of the input basis, 1 ≤ a ≤ I.
        dtype: float32 or float64.
        device: where the state lives.

    Raises:
        ShapeError: for a shape of fewer than two dimensions, a rank out of range, another dtype.
    """
    if len(shape) < 2:
        raise ShapeError(
            f"four-block shape {tuple(shape)} is not a matrix [..., O, I]: reshape the parameter "
            "to a matrix or give it AdamW's rule"
        )
    if dtype not in (torch.float32, torch.float64):
        raise ShapeError(f"four-block dtype {dtype} is too narrow: use torch.float32 or float64")
    *batch, d_out, d_in = shape
    for name, rank, width in (("rank_out", rank_out, d_out), ("rank_in", rank_in, d_in)):
        if not 1 <= rank <= width:
            raise ShapeError(f"{name} {rank} is not in 1..{width}: pass min(rank, {width})")

    def zeros(*tail: int) -> Tensor:
        return torch.zeros([*batch, *tail], dtype=dtype, device=device)

    right = (0 if rank_out == d_out else d_out, rank_in)
    left = (rank_out, 0 if rank_in == d_in else d_in)
    return FourBlockState(
        momentum_OI=zeros(d_out, d_in),
        core_ga=zeros(rank_out, rank_in),
        right_Oa=zeros(*right),
        left_gI=zeros(*left),
        v_core_ga=zeros(rank_out, rank_in),
        v_right_Oa=zeros(*right),
        v_left_gI=zeros(*left),
        v_rest=zeros(),
    )


def advance(
    state: FourBlockState,
    grad_OI: Tensor,
    basis_out_Og: Tensor,
    basis_in_Ia: Tensor,
    *,
    step: int,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    projections: Projections | None = None,
) -> tuple[Direction, FourBlockState]:
    """One step: fold the gradient into momentum and moments and return the direction.

        P = M/√v₃ + (R̂ − R/√v₃) U_Aᵀ + U_G [(L̂ − L/√v₃) + (Ĉ − C/√v₃) U_Aᵀ]

    where a hat divides a part of M by the root of its moment (both bias corrected), R̂ is scaled by
    √((O−g)/O) and L̂ by √((I−a)/I): their elements share fewer degrees of freedom than they are.
    8·r·O·I flops for two thin bases with `Direction.subtract_from`; nothing of size O×I is made.

    The tensors of `state` are overwritten; go on with the returned state alone.

    Args:
        state: of `init_state`, `update` or `turn`.
        grad_OI: [..., O, I], any float dtype, finite.
        basis_out_Og: the installed U_G, orthonormal columns, dtype of the state.
        basis_in_Ia: the installed U_A, likewise.
        step: how many gradients the state will have seen with this one, from 1.
        beta1: decay of the momentum.
        beta2: decay of the second moments.
        eps: added to the roots, in units of the gradient.
        projections: the gradient's in these bases, where they are there already; overwritten.

    Returns:
        The direction P in factors, in the dtype of the state, and the state.

    Raises:
        ShapeError: for shapes that do not fit together.
        ValueError: for step < 1.
    """
    if step < 1:
        raise ValueError(f"four-block step {step} is not positive: count updates from 1")
    if grad_OI.shape != state.momentum_OI.shape:
        raise ShapeError(
            f"gradient has shape {tuple(grad_OI.shape)}, but the state was made for "
            f"{tuple(state.momentum_OI.shape)}: use the state of this block"
        )
    check_bases(grad_OI.shape, basis_out_Og, basis_in_Ia)
    rank_out, rank_in = basis_out_Og.shape[-1], basis_in_Ia.shape[-1]
    if state.core_ga.shape[-2:] != (rank_out, rank_in):
        raise ShapeError(
            f"bases of rank {rank_out} and {rank_in} differ from the state's "
            f"{tuple(state.core_ga.shape[-2:])}: call turn() when a new version is installed"
        )
    d_out, d_in = grad_OI.shape[-2:]
    grad_OI = grad_OI.to(state.momentum_OI.dtype)

    grad = split(grad_OI, basis_out_Og, basis_in_Ia, projections)
    v_rest = state.v_rest
    has_rest = rank_out < d_out and rank_in < d_in
    if has_rest:
        mean_square = rest_energy(grad_OI, grad) / ((d_out - rank_out) * (d_in - rank_in))
        v_rest.lerp_(mean_square.to(v_rest.dtype), 1 - beta2)
    for moment, part in zip(state.moments, grad, strict=True):
        moment.mul_(beta2).addcmul_(part, part, value=1 - beta2)
    # The parts are linear in the matrix, so those of the momentum follow by the same EMA as the
    # momentum itself for as long as the basis stands.
    state.momentum_OI.lerp_(grad_OI, 1 - beta1)
    momentum = Parts(state.core_ga, state.right_Oa, state.left_gI)
    for mean, part in zip(momentum, grad, strict=True):
        mean.lerp_(part, 1 - beta1)

    bias1 = 1 - beta1**step
    root_bias2 = (1 - beta2**step) ** 0.5
    per_rest = torch.zeros_like(v_rest)
    if has_rest:
        core, right, left = (moment.sum((-2, -1)) for moment in state.moments)
        total = core + right + left
        floored = torch.maximum(v_rest, total * (REST_FLOOR / (d_out * d_in)))
        per_rest = (floored.sqrt_().div_(root_bias2).add_(eps).mul_(bias1)).reciprocal_()
    per_rest = per_rest[..., None, None]

    def corrected(part: Tensor, moment: Tensor, share: float) -> Tensor:
        root = moment.sqrt().div_(root_bias2).add_(eps).mul_(bias1 / share**0.5)
        return (part / root).sub_(part * per_rest)

    core_ga = corrected(momentum.core_ga, state.v_core_ga, 1.0)
    inner_gI = core_ga @ basis_in_Ia.mT
    if rank_in < d_in:
        share = (d_in - rank_in) / d_in
        inner_gI.add_(corrected(momentum.left_gI, state.v_left_gI, share))
    right_Oa = None
    if rank_out < d_out:
        share = (d_out - rank_out) / d_out
        right_Oa = corrected(momentum.right_Oa, state.v_right_Oa, share)
    direction = Direction(
        momentum_OI=state.momentum_OI,
        per_rest=per_rest[..., 0, 0] if has_rest else None,
        basis_out_Og=basis_out_Og,
        inner_gI=inner_gI,
        right_Oa=right_Oa,
        basis_in_Ia=basis_in_Ia,
    )
    return direction, state


def update(
    state: FourBlockState,
    grad_OI: Tensor,
    basis_out_Og: Tensor,
    basis_in_Ia: Tensor,
    *,
    step: int,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
) -> tuple[Tensor, FourBlockState]:
    """`advance` with the direction formed, [..., O, I]: subtract lr times it."""
    direction, state = advance(
        state, grad_OI, basis_out_Og, basis_in_Ia, step=step, beta1=beta1, beta2=beta2, eps=eps
    )
    return direction.dense(), state
