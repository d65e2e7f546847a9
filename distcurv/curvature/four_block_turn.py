"""The install of the four-block rule: carry the second moments over to a new basis.

Why this file exists: when a version is installed the moments refer to directions that no longer
exist. Dropping them would restart Adam every few steps, so they are turned: each part of the old
second moment is shared out over the parts of the new basis, such that the total (the expected
squared norm of the gradient) is conserved. At full rank on both sides this is SOAP with the moments
turned by squared rotations, V' = (Q_G∘Q_G) V (Q_A∘Q_A)ᵀ.

Seen from one side, with U the old and N the new basis, energy sits either *in* the basis (one
number for each of r directions) or *beside* it (one number for each of d coordinates). A `_Side`
holds what goes where; the matrix rule is the product of the two sides.

Shape suffixes: those of four_block (O, I, g, a), new ranks h (output) and b (input); for one side
alone d width, r old rank, s new rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distcurv.curvature.four_block_parts import check_bases, project_rows, split_rows
from distcurv.curvature.four_block_state import FourBlockState
from distcurv.errors import ShapeError

# A coordinate with less than this share of itself outside the old basis has nothing to share out;
# dividing by the share would only amplify rounding.
MIN_OUTSIDE = 1e-5


class _Side(NamedTuple):
    """How squared components move on one side; every column of (into; beside) sums to 1."""

    in_to_in_sr: Tensor  # direction r → direction s
    in_to_beside_dr: Tensor  # direction r → coordinate d of the new complement
    beside_to_in_sd: Tensor  # coordinate d of the old complement → direction s
    beside_kept_d: Tensor  # share of coordinate d that stays beside the basis
    rest_to_in_s: Tensor  # dimensions of the old complement that fall into direction s
    rest_kept_d: Tensor  # dimensions of the old complement left at coordinate d
    was_full: bool
    is_full: bool


class Turning(NamedTuple):
    """A turn between its two halves: ``addends`` are sums over the rows that are here.

    [bc_G R; cc_Gᵀ R] of the moments and what `project_rows` makes of the momentum."""

    rows: tuple[int, int]
    out: _Side
    inp: _Side
    new_out_oh: Tensor
    new_in_Ib: Tensor
    momentum_in_ob: Tensor | None
    addends: tuple[Tensor, Tensor]


def turn(
    state: FourBlockState,
    old_out_Og: Tensor,
    old_in_Ia: Tensor,
    new_out_Oh: Tensor,
    new_in_Ib: Tensor,
) -> FourBlockState:
    """The state in the new bases: moments turned, parts of the momentum projected afresh.

    Call it between two updates, on all training ranks at the same step. The ranks may change. The
    momentum itself is shared with the old state, nothing is overwritten. 4·r·O·I flops, most of
    them for the projections of the momentum; stagger blocks where that shows.

    Before the first update no turn is needed: `init_state` is the same in every basis.

    Args:
        state: of the last update.
        old_out_Og: U_G of the version now installed, orthonormal columns, dtype of the state.
        old_in_Ia: U_A of the version now installed.
        new_out_Oh: U_G of the version to install.
        new_in_Ib: U_A of the version to install.

    Raises:
        ShapeError: where a basis does not fit the block, or the old ones do not fit the state.
    """
    turning = begin_turn(state, old_out_Og, old_in_Ia, new_out_Oh, new_in_Ib, None)
    return complete_turn(state, turning, turning.addends)


def begin_turn(
    state: FourBlockState,
    old_out_Og: Tensor,
    old_in_Ia: Tensor,
    new_out_Oh: Tensor,
    new_in_Ib: Tensor,
    rows: tuple[int, int] | None,
) -> Turning:
    """The first half of `turn`, of a state that has only these rows of the block, or None for all;
    with the whole bases.

    Raises:
        ShapeError: as `turn`.
    """
    *batch, here, d_in = state.momentum_OI.shape
    start, stop = rows or (0, here)
    # Of a part only the bases know the whole.
    d_out = here if rows is None else old_out_Og.shape[-2]
    shape = (*batch, d_out, d_in)
    check_bases(shape, old_out_Og, old_in_Ia)
    check_bases(shape, new_out_Oh, new_in_Ib)
    old_ranks = (old_out_Og.shape[-1], old_in_Ia.shape[-1])
    if state.core_ga.shape[-2:] != old_ranks:
        raise ShapeError(
            f"old bases of rank {old_ranks} differ from the state's "
            f"{tuple(state.core_ga.shape[-2:])}: pass the bases of the last update"
        )
    out = _side(old_out_Og, new_out_Oh)
    inp = _side(old_in_Ia, new_in_Ib)
    if rows is not None and (out.was_full, inp.was_full) != (out.is_full, inp.is_full):
        raise ShapeError(
            f"a sharded block turns from ranks {old_ranks} to "
            f"{(new_out_Oh.shape[-1], new_in_Ib.shape[-1])}, one of them full: install "
            "bases of the ranks that the block's spec says"
        )
    beside = state.v_right_Oa.new_zeros(0)
    if not out.was_full:
        leaves_so = out.beside_to_in_sd[..., :, start:stop]
        stays_1o = out.beside_kept_d[..., None, start:stop]
        beside = torch.cat([leaves_so, stays_1o], -2) @ state.v_right_Oa
    new_out_oh = new_out_Oh[..., start:stop, :]
    in_ob, over_rows = project_rows(state.momentum_OI, new_out_oh, new_in_Ib, d_out)
    return Turning((start, stop), out, inp, new_out_oh, new_in_Ib, in_ob, (beside, over_rows))


def complete_turn(
    state: FourBlockState, turning: Turning, summed: Sequence[Tensor]
) -> FourBlockState:
    """The second half of `turn`: ``summed`` are the addends, summed over all ranks with rows of
    the block; overwritten."""
    (start, stop), out, inp, new_out_oh, new_in_Ib, momentum_in_ob, _ = turning
    beside, over_rows = summed
    core_ga, right_oa, left_gI = state.moments
    d_out, d_in = out.beside_kept_d.shape[-1], new_in_Ib.shape[-2]
    rank_out = new_out_oh.shape[-1]

    # Old energy by where it sits on the input side, seen from the output side's basis and
    # complement: first turn the input side, then the output side.
    basis_in_gb = core_ga @ inp.in_to_in_sr.mT
    basis_beside_gI = core_ga @ inp.in_to_beside_dr.mT
    if not inp.was_full:
        basis_in_gb = basis_in_gb + left_gI @ inp.beside_to_in_sd.mT
        basis_beside_gI = basis_beside_gI + left_gI * inp.beside_kept_d[..., None, :]
    v_core = out.in_to_in_sr @ basis_in_gb
    v_right = out.in_to_beside_dr[..., start:stop, :] @ basis_in_gb
    v_left = out.in_to_in_sr @ basis_beside_gI
    rest = _total(out.in_to_beside_dr.sum(-2, keepdim=True) @ basis_beside_gI)
    if not out.was_full:
        leaves_ha, stays_1a = beside[..., :rank_out, :], beside[..., rank_out:, :]
        v_core = v_core + leaves_ha @ inp.in_to_in_sr.mT
        v_left = v_left + leaves_ha @ inp.in_to_beside_dr.mT
        kept_o1 = out.beside_kept_d[..., start:stop, None]
        v_right = v_right + kept_o1 * (right_oa @ inp.in_to_in_sr.mT)
        rest = rest + _total(stays_1a @ inp.in_to_beside_dr.sum(-2)[..., :, None])
    if not (out.was_full or inp.was_full):
        in_h, kept_O = out.rest_to_in_s[..., :, None], out.rest_kept_d[..., :, None]
        in_b, kept_I = inp.rest_to_in_s[..., None, :], inp.rest_kept_d[..., None, :]
        old_rest = state.v_rest[..., None, None]
        v_core = v_core + old_rest * (in_h * in_b)
        v_right = v_right + old_rest * (kept_O[..., start:stop, :] * in_b)
        v_left = v_left + old_rest * (in_h * kept_I)
        rest = rest + state.v_rest * _total(kept_O) * _total(kept_I)

    dims_out, dims_in = d_out - rank_out, d_in - new_in_Ib.shape[-1]
    v_rest, v_parts = torch.zeros_like(rest), torch.zeros_like(rest)
    if dims_out and dims_in:
        v_rest = rest / (dims_out * dims_in)
        v_parts = (_energy(state, d_out) - rest).clamp_min_(0.0)  # a turn conserves the total
    momentum = split_rows(momentum_in_ob, over_rows, new_out_oh, new_in_Ib, d_out)
    return FourBlockState(
        momentum_OI=state.momentum_OI,
        core_ga=momentum.core_ga,
        right_Oa=momentum.right_Oa,
        left_gI=momentum.left_gI,
        v_core_ga=v_core,
        v_right_Oa=v_right[..., :0, :] if out.is_full else v_right,
        v_left_gI=v_left[..., :0] if inp.is_full else v_left,
        v_rest=v_rest,
        v_parts=v_parts,
    )


def second_moment_total(state: FourBlockState, basis_out_Og: Tensor, basis_in_Ia: Tensor) -> Tensor:
    """Sum of the second moments over all parts, [...] in float64: what `turn` conserves."""
    d_out, rank_out = basis_out_Og.shape[-2:]
    d_in, rank_in = basis_in_Ia.shape[-2:]
    total = state.v_rest.double() * ((d_out - rank_out) * (d_in - rank_in))
    for moment in state.moments:
        total = total + moment.sum((-2, -1), dtype=torch.float64)
    return total


def _energy(state: FourBlockState, d_out: int) -> Tensor:
    """Sum of the second moments over all parts, [...]."""
    d_in, (g, a) = state.momentum_OI.shape[-1], state.core_ga.shape[-2:]
    if g < d_out and a < d_in:
        return state.v_parts + state.v_rest * ((d_out - g) * (d_in - a))
    core_ga, right_Oa, left_gI = state.moments
    return _total(core_ga) + _total(right_Oa) + _total(left_gI)


def _side(old_dr: Tensor, new_ds: Tensor) -> _Side:
    was_full = old_dr.shape[-1] == old_dr.shape[-2]
    is_full = new_ds.shape[-1] == new_ds.shape[-2]
    overlap_sr = new_ds.mT @ old_dr
    in_to_beside_dr = (old_dr - new_ds @ overlap_sr).square_()
    if is_full:
        in_to_beside_dr.zero_()
    # What is outside the old basis, per coordinate: how much there is, and how much of it the new
    # directions take up (Cauchy-Schwarz: never more than there is).
    outside_d = (1 - old_dr.square().sum(-1)).clamp_min_(0.0)
    taken_ds = (new_ds - old_dr @ overlap_sr.mT).square_()
    share_ds = taken_ds / outside_d.clamp_min(MIN_OUTSIDE)[..., None]
    # A coordinate that lies in the old basis has no complement to ask; its own squared components
    # along the new directions are as good, and lose nothing where the new basis is full.
    inside_d = outside_d < MIN_OUTSIDE
    share_ds = torch.where(inside_d[..., None], new_ds.square(), share_ds)
    taken_d = share_ds.sum(-1)
    if is_full:
        share_ds = share_ds / taken_d[..., None]
        kept_d = torch.zeros_like(taken_d)
    else:
        share_ds = share_ds / taken_d.clamp_min(1.0)[..., None]
        kept_d = (1 - taken_d).clamp_min_(0.0)
    return _Side(
        in_to_in_sr=overlap_sr.square(),
        in_to_beside_dr=in_to_beside_dr,
        beside_to_in_sd=share_ds.mT,
        beside_kept_d=kept_d,
        rest_to_in_s=(share_ds.mT @ outside_d[..., None])[..., 0],
        rest_kept_d=kept_d * outside_d,
        was_full=was_full,
        is_full=is_full,
    )


def _total(matrix: Tensor) -> Tensor:
    return matrix.sum((-2, -1))
