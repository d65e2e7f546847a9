"""The four-block rule where every rank holds only some rows of a block's gradient.

U_A meets whole rows, so X U_A is local; U_GᵀX is a sum over rows: g·I numbers (g·a where a = I) for
the ranks to add up at a step, and two more,

    [‖X‖² − ‖X U_A‖², ‖X U_A‖²],

from which the energy of the rest, ‖X‖² − ‖X U_A‖² − ‖L‖², and of the right part, ‖X U_A‖² − ‖C‖²,
follow for all rows. The core, the left part and their moments are then the same on all ranks; the
momentum, the right part and its moment are those of the rank's own rows.

Shape suffixes: those of four_block; o for the rows of this rank among the O.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distcurv.curvature.direction import Direction
from distcurv.curvature.four_block import fold_parts
from distcurv.curvature.four_block_parts import Energies, project_rows, split_rows
from distcurv.curvature.four_block_state import FourBlockState
from distcurv.curvature.spec import BlockSpec, Tensors
from distcurv.curvature.statistics import encode_rows
from distcurv.errors import ShapeError


class ShardProducts(NamedTuple):
    """A gradient's rows and bases multiplied: X U_A [o, a] (None where g = O and a < I), and the
    addends of the sum over ranks, U_GᵀX [g, I] (or the core [g, a] where a = I) and numbers [2]."""

    in_oa: Tensor | None
    addends: tuple[Tensor, Tensor]


class SummedProducts(NamedTuple):
    """`ShardProducts` with the sums over all ranks that have rows of the block."""

    in_oa: Tensor | None
    over_rows: Tensor
    numbers_2: Tensor


def multiply(
    grad_oI: Tensor,
    basis_out_og: Tensor,
    basis_in_Ia: Tensor,
    d_out: int,
) -> ShardProducts:
    """What is local of a step, before the sum.

    Args:
        grad_oI: X, this rank's rows; float32, finite or not.
        basis_out_og: the same rows of U_G.
        basis_in_Ia: U_A.
        d_out: O.

    Raises:
        ShapeError: gradient and bases do not fit.
    """
    if grad_oI.shape != (len(basis_out_og), len(basis_in_Ia)):
        raise ShapeError(
            f"a shard's gradient has shape {tuple(grad_oI.shape)}, its bases "
            f"{tuple(basis_out_og.shape)} and {tuple(basis_in_Ia.shape)}: give the rows of U_G "
            "that this rank has of the gradient, and the whole U_A"
        )
    in_oa, over_rows = project_rows(grad_oI, basis_out_og, basis_in_Ia, d_out)
    whole = _square(grad_oI)
    inside = whole.new_zeros(()) if in_oa is None else _square(in_oa)
    numbers_2 = torch.stack([whole - inside, inside]).to(grad_oI.dtype)
    return ShardProducts(in_oa, (over_rows, numbers_2))


def advance_shards(
    states: Sequence[FourBlockState],
    grads_oI: Sequence[Tensor],
    products: Sequence[SummedProducts],
    bases_out_og: Sequence[Tensor],
    bases_in_Ia: Sequence[Tensor],
    heights: Sequence[int],
    *,
    steps: Sequence[int],
    beta1: float,
    beta2: float,
    eps: float,
) -> list[Direction]:
    """`advance` for the rows of this rank; returns their directions.

    Args:
        states: of `init_state` with ``rows``, or of a turn; overwritten.
        grads_oI: this rank's rows of each gradient, in the dtype of the states.
        products: of each gradient in the bases in use; overwritten.
        bases_out_og: the same rows of each U_G.
        bases_in_Ia: each U_A.
        heights: O of each block.
        steps, beta1, beta2, eps: as `advance`.
    """
    if not states:
        return []
    parts, open_, energy = [], [], Energies([], [])
    for b, (product, out_og, in_Ia, d_out) in enumerate(
        zip(products, bases_out_og, bases_in_Ia, heights, strict=True)
    ):
        own = split_rows(product.in_oa, product.over_rows, out_og, in_Ia, d_out)
        parts.append(own)
        d_in, (g, a) = len(in_Ia), own.core_ga.shape
        if g == d_out or a == d_in:
            continue
        open_.append(b)
        # ‖X U_A‖² is ‖C‖² + ‖R‖², of all rows.
        beside, core_and_right = product.numbers_2.double().unbind()
        left = _square(own.left_gI)
        rest = (beside - left).clamp_min(0.0)
        energy.rest_mean_squares.append(rest / ((d_out - g) * (d_in - a)))
        energy.inside.append(core_and_right + left)
    bases = (bases_out_og, bases_in_Ia)
    return fold_parts(
        states,
        grads_oI,
        parts,
        bases,
        heights,
        open_,
        energy,
        steps,
        (beta1, beta2),
        eps,
    )


def encode_shard(
    spec: BlockSpec,
    grad_oI: Tensor,
    rows: tuple[int, int],
    basis: Tensors,
    products: SummedProducts,
    *,
    counts: bool,
) -> Tensors:
    """This rank's addend to what `encode_gradient` makes of the whole gradient.

    Args:
        spec: the block; its side G is a sketch.
        grad_oI: X, the rows of this rank, float32.
        rows: which of the O rows they are.
        basis: published tensors of the version to sketch against.
        products: of the gradient in that very basis; only read.
        counts: whether this rank contributes the counts; one of all ranks does.

    Returns:
        Statistic by prefixed names with ``A.count``, ``G.count`` and ``steps``; zeros on all ranks
        where the gradient is not finite on one.

    Raises:
        ShapeError: side G is not a sketch, which alone is a sum over rows.
    """
    side_A, side_G = spec.sides
    if side_G.encoding != "sketch":
        raise ShapeError(
            f"block {spec.name!r} is sharded and its side G has encoding {side_G.encoding!r}: only "
            "a sketch can be made of parts of the gradient"
        )
    U_A = basis["A.U"] if side_A.encoding == "sketch" else None
    over_Ig = products.over_rows.mT
    if side_A.rank == side_A.dim:
        over_Ig = basis["A.U"] @ over_Ig
    trace = torch.linalg.vector_norm(grad_oI, dim=-1).square_().sum()
    encoded = encode_rows(side_A, grad_oI, U_A, product_Nr=products.in_oa, trace=trace)
    statistic = {f"A.{name}": value for name, value in encoded.items()}
    start, stop = rows
    Y_Og = grad_oI.new_zeros(side_G.dim, side_G.rank)
    Y_Og[start:stop] = grad_oI @ over_Ig
    statistic["G.Y"] = Y_Og
    if side_G.tail == "diagonal":
        statistic["G.diag"] = grad_oI.new_zeros(side_G.dim)
        statistic["G.diag"][start:stop] = grad_oI.square().sum(-1)
    statistic["G.trace"] = trace
    count = grad_oI.new_full((), float(counts))
    statistic.update({"A.count": count, "G.count": count, "steps": count})
    # Their sum is ‖X‖²: beside the bases alone it may be finite where the trace no longer is.
    finite = torch.isfinite(products.numbers_2.sum())
    if finite.device.type == "cpu" and bool(finite):
        return statistic  # read for free on the CPU
    return {name: torch.where(finite, value, 0.0) for name, value in statistic.items()}


def _square(matrix: Tensor) -> Tensor:
    """‖matrix‖², float64; the rows in the matrix's own precision."""
    rows: Tensor = torch.linalg.vector_norm(matrix, dim=-1).double().square_()
    return rows.sum()
