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

import torch
from torch import Tensor

from distcurv.curvature.direction import Direction
from distcurv.curvature.four_block_parts import (
    Energies,
    Parts,
    Projections,
    check_bases,
    energies,
    split,
)
from distcurv.curvature.four_block_state import FourBlockState
from distcurv.errors import ShapeError

# v₃ is read as at least this share of the mean second moment over all entries. Without it a rest
# that is empty but for rounding is divided by its own noise and the step diverges in float32.
REST_FLOOR = 1e-4


def advance(
    states: Sequence[FourBlockState],
    grads_OI: Sequence[Tensor],
    bases_out_Og: Sequence[Tensor],
    bases_in_Ia: Sequence[Tensor],
    *,
    steps: Sequence[int],
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    projections: Sequence[Projections | None] | None = None,
) -> list[Direction]:
    """One step of all blocks: fold the gradients into momenta and moments, return the directions.

        P = M/√v₃ + (R̂ − R/√v₃) U_Aᵀ + U_G [(L̂ − L/√v₃) + (Ĉ − C/√v₃) U_Aᵀ]

    where a hat divides a part of M by the root of its moment (both bias corrected), R̂ is scaled by
    √((O−g)/O) and L̂ by √((I−a)/I): their elements share fewer degrees of freedom than they are.
    8·r·O·I flops for two thin bases with `Direction.subtract_from`; nothing of size O×I is made.

    Blocks of all shapes go through each elementwise operation together (torch's ``_foreach`` ones,
    which torch.optim rests on): with small blocks the calls cost more than the arithmetic.

    The tensors of ``states`` are overwritten.

    Args:
        states: of `init_state` or `turn`, one for each block; 2-D, all of one dtype and device.
        grads_OI: [O, I] each, any float dtype, finite.
        bases_out_Og: the installed U_G, orthonormal columns, dtype of the states.
        bases_in_Ia: the installed U_A, likewise.
        steps: how many gradients each state will have seen with this one, from 1.
        beta1: decay of the momentum.
        beta2: decay of the second moments.
        eps: added to the roots, in units of the gradient.
        projections: of each gradient in these bases, where they are there already; overwritten.

    Returns:
        The direction P of each block in factors, in the dtype of the states.

    Raises:
        ShapeError: for shapes that do not fit together.
        ValueError: for a step < 1.
    """
    if not states:
        return []
    for number, (state, grad, out, into) in enumerate(
        zip(states, grads_OI, bases_out_Og, bases_in_Ia, strict=True)
    ):
        _check(state, grad, out, into, steps[number])
    grads = [g.to(s.momentum_OI.dtype) for g, s in zip(grads_OI, states, strict=True)]
    made = projections if projections is not None else [None] * len(states)
    parts = [
        split(grad, out, into, projected)
        for grad, out, into, projected in zip(grads, bases_out_Og, bases_in_Ia, made, strict=True)
    ]
    open_ = [b for b, s in enumerate(states) if s.right_Oa.numel() and s.left_gI.numel()]
    energy = Energies([], [])
    if open_:
        energy = energies([grads[b] for b in open_], [parts[b] for b in open_])
    bases = (bases_out_Og, bases_in_Ia)
    heights = [len(out) for out in bases_out_Og]
    return fold_parts(
        states, grads, parts, bases, heights, open_, energy, steps, (beta1, beta2), eps
    )


def fold_parts(
    states: Sequence[FourBlockState],
    grads: Sequence[Tensor],
    parts: Sequence[Parts],
    bases: tuple[Sequence[Tensor], Sequence[Tensor]],
    heights: Sequence[int],
    open_: Sequence[int],
    energy: Energies,
    steps: Sequence[int],
    betas: tuple[float, float],
    eps: float,
) -> list[Direction]:
    """What `advance` does once the gradients are split; their rows may be those of one rank.

    Args:
        states, grads, steps, eps: see `advance`; ``grads`` have the dtype of the states.
        parts: of the gradients.
        bases: (U_G, U_A) of each block; U_G with the rows that ``grads`` have.
        heights: O of each block, however many rows are here.
        open_: the blocks that have a rest.
        energy: of each open block's gradient, over all its rows.
        betas: (β₁, β₂).
    """
    beta1, beta2 = betas
    bases_out_Og, bases_in_Ia = bases
    kept = [(b, i) for b, of_block in enumerate(parts) for i in range(3) if of_block[i].numel()]
    new = [parts[b][i] for b, i in kept]
    moments = [states[b].moments[i] for b, i in kept]
    means = [states[b].means[i] for b, i in kept]

    if open_:
        dtype = states[0].v_rest.dtype
        torch._foreach_lerp_(
            [states[b].v_rest for b in open_] + [states[b].v_parts for b in open_],
            [e.to(dtype) for e in energy.rest_mean_squares + energy.inside],
            1 - beta2,
        )
    torch._foreach_mul_(moments, beta2)
    torch._foreach_addcmul_(moments, new, new, 1 - beta2)
    # The parts are linear in the matrix, so those of the momentum follow by the same EMA as the
    # momentum itself for as long as the basis stands.
    momenta = [state.momentum_OI for state in states]
    torch._foreach_lerp_(momenta + means, [*grads, *new], 1 - beta1)

    bias1 = [1 - beta1**step for step in steps]
    root_bias2 = [(1 - beta2**step) ** 0.5 for step in steps]
    per_rest: list[Tensor | None] = [None] * len(states)
    if open_:
        rates = _per_rest(states, heights, open_, bias1, root_bias2, eps)
        for b, rate in zip(open_, rates, strict=True):
            per_rest[b] = rate
    shares = [_share(states[b], heights[b], i) ** 0.5 for b, i in kept]
    scales = torch._foreach_sqrt(moments)
    torch._foreach_mul_(
        scales, [bias1[b] / (root_bias2[b] * sh) for (b, _), sh in zip(kept, shares, strict=True)]
    )
    torch._foreach_add_(
        scales, [eps * bias1[b] / sh for (b, _), sh in zip(kept, shares, strict=True)]
    )
    torch._foreach_reciprocal_(scales)
    rests = [
        (place, value) for place, (b, _) in enumerate(kept) if (value := per_rest[b]) is not None
    ]
    if rests:
        torch._foreach_sub_([scales[place] for place, _ in rests], [value for _, value in rests])
    torch._foreach_mul_(scales, means)
    corrected = dict(zip(kept, scales, strict=True))

    directions = []
    for b, (state, out, into) in enumerate(zip(states, bases_out_Og, bases_in_Ia, strict=True)):
        core_ga, left_gI = corrected[b, 0], corrected.get((b, 2))
        inner_gI = core_ga @ into.mT if left_gI is None else left_gI.addmm_(core_ga, into.mT)
        directions.append(
            Direction(state.momentum_OI, per_rest[b], out, inner_gI, corrected.get((b, 1)), into)
        )
    return directions


def _per_rest(
    states: Sequence[FourBlockState],
    heights: Sequence[int],
    open_: Sequence[int],
    bias1: Sequence[float],
    root_bias2: Sequence[float],
    eps: float,
) -> list[Tensor]:
    """1/√v₃ with the floor and Adam's bias corrections, 0-dim each."""
    numbers = [heights[b] * states[b].momentum_OI.shape[1] for b in open_]
    floors = list(torch._foreach_mul([states[b].v_parts for b in open_], REST_FLOOR))
    torch._foreach_div_(floors, [float(number) for number in numbers])
    torch._foreach_maximum_(floors, [states[b].v_rest for b in open_])
    torch._foreach_sqrt_(floors)
    torch._foreach_mul_(floors, [bias1[b] / root_bias2[b] for b in open_])
    torch._foreach_add_(floors, [eps * bias1[b] for b in open_])
    torch._foreach_reciprocal_(floors)
    return floors


def _share(state: FourBlockState, d_out: int, part: int) -> float:
    """What of its degrees of freedom a part's elements have for themselves."""
    d_in = state.momentum_OI.shape[1]
    rank_out, rank_in = state.core_ga.shape
    return (1.0, (d_out - rank_out) / d_out, (d_in - rank_in) / d_in)[part]


def _check(
    state: FourBlockState, grad_OI: Tensor, basis_out_Og: Tensor, basis_in_Ia: Tensor, step: int
) -> None:
    if step < 1:
        raise ValueError(f"four-block step {step} is not positive: count updates from 1")
    if grad_OI.shape != state.momentum_OI.shape:
        raise ShapeError(
            f"gradient has shape {tuple(grad_OI.shape)}, but the state was made for "
            f"{tuple(state.momentum_OI.shape)}: use the state of this block"
        )
    check_bases(grad_OI.shape, basis_out_Og, basis_in_Ia)
    ranks = (basis_out_Og.shape[-1], basis_in_Ia.shape[-1])
    if state.core_ga.shape != ranks:
        raise ShapeError(
            f"bases of rank {ranks[0]} and {ranks[1]} differ from the state's "
            f"{tuple(state.core_ga.shape)}: call turn() when a new version is installed"
        )
