"""What the four-block rule carries from step to step.

Shape suffixes: those of four_block (O, I, g, a), after any number of leading batch dimensions.
Where a block is sharded, the momentum and the right part have the rows of this rank in place of O.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distcurv.curvature.four_block_parts import Parts
from distcurv.errors import ShapeError


class FourBlockState(NamedTuple):
    """All that `advance` carries from step to step; flat, so that it can be saved field by field.

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
    v_parts: Tensor  # [...]: sum of the three moments, over all rows; not kept where there is none

    @property
    def means(self) -> Parts:
        """The momentum's parts."""
        return Parts(self.core_ga, self.right_Oa, self.left_gI)

    @property
    def moments(self) -> Parts:
        """The elementwise second moments, in the order of `Parts`."""
        return Parts(self.v_core_ga, self.v_right_Oa, self.v_left_gI)


def init_state(
    shape: Sequence[int],
    rank_out: int,
    rank_in: int,
    *,
    rows: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> FourBlockState:
    """The state before the first update: momentum and moments zero, hence valid in any basis.

    Args:
        shape: [..., O, I], the shape of the gradient, leading batch dimensions first.
        rank_out: g, columns of the output basis, 1 ≤ g ≤ O.
        rank_in: a, columns of the input basis, 1 ≤ a ≤ I.
        rows: how many of the O rows are here, where the block is sharded; None: all.
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

    here = d_out if rows is None else rows
    right = (0 if rank_out == d_out else here, rank_in)
    left = (rank_out, 0 if rank_in == d_in else d_in)
    return FourBlockState(
        momentum_OI=zeros(here, d_in),
        core_ga=zeros(rank_out, rank_in),
        right_Oa=zeros(*right),
        left_gI=zeros(*left),
        v_core_ga=zeros(rank_out, rank_in),
        v_right_Oa=zeros(*right),
        v_left_gI=zeros(*left),
        v_rest=zeros(),
        v_parts=zeros(),
    )
