"""The four orthogonal parts of a matrix in two low-rank bases; three are kept, the rest is counted.

Shape suffixes: those of four_block (O, I, g, a) after any number of leading batch dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distcurv.errors import ShapeError


class Parts(NamedTuple):
    """Three of the four orthogonal parts of a matrix; the rest is never formed.

    `core_ga`, `right_Oa` ([..., 0, a] where g = O), `left_gI` ([..., g, 0] where a = I).
    """

    core_ga: Tensor
    right_Oa: Tensor
    left_gI: Tensor


def check_bases(shape: Sequence[int], basis_out_Og: Tensor, basis_in_Ia: Tensor) -> None:
    """Refuse bases that do not belong to a matrix of `shape` [..., O, I].

    Raises:
        ShapeError: naming the basis, its shape and the expected one.
    """
    *batch, d_out, d_in = shape
    for name, basis, width in (("output", basis_out_Og, d_out), ("input", basis_in_Ia, d_in)):
        good = basis.dim() == len(shape) and list(basis.shape[:-2]) == batch
        if not good or basis.shape[-2] != width or not 1 <= basis.shape[-1] <= width:
            expected = "×".join(str(n) for n in [*batch, width])
            raise ShapeError(
                f"{name} basis has shape {tuple(basis.shape)}, but a block of shape "
                f"{tuple(shape)} needs {expected}×r with 1 ≤ r ≤ {width}: install the basis of "
                "this block"
            )


class Projections(NamedTuple):
    """X U_A [..., O, a] and U_Gᵀ X [..., g, I], as far as `split` needs them."""

    in_Oa: Tensor | None
    out_gI: Tensor | None


def project(matrix_OI: Tensor, basis_out_Og: Tensor, basis_in_Ia: Tensor) -> Projections:
    """The products of a matrix with its bases: 4·r·O·I flops for two thin ones."""
    full_out = basis_out_Og.shape[-1] == basis_out_Og.shape[-2]
    full_in = basis_in_Ia.shape[-1] == basis_in_Ia.shape[-2]
    return Projections(
        None if full_out and not full_in else matrix_OI @ basis_in_Ia,
        None if full_in else basis_out_Og.mT @ matrix_OI,
    )


def split(
    matrix_OI: Tensor,
    basis_out_Og: Tensor,
    basis_in_Ia: Tensor,
    projections: Projections | None = None,
) -> Parts:
    """Core, right and left part of a matrix.

    The full-size parts are U_G C U_Aᵀ, R U_Aᵀ and U_G L; with the rest they are orthogonal to one
    another and sum to the matrix.

    Args:
        matrix_OI: [..., O, I], the dtype of the bases.
        basis_out_Og: U_G with orthonormal columns.
        basis_in_Ia: U_A with orthonormal columns.
        projections: of `project` for this matrix and these bases, where they are there already;
            overwritten.
    """
    in_Oa, out_gI = projections or project(matrix_OI, basis_out_Og, basis_in_Ia)
    batch = matrix_OI.shape[:-2]
    right_Oa = matrix_OI.new_empty([*batch, 0, basis_in_Ia.shape[-1]])
    left_gI = matrix_OI.new_empty([*batch, basis_out_Og.shape[-1], 0])
    if in_Oa is None:
        assert out_gI is not None
        core_ga = out_gI @ basis_in_Ia
    else:
        core_ga = basis_out_Og.mT @ in_Oa
        if basis_out_Og.shape[-1] < basis_out_Og.shape[-2]:
            right_Oa = in_Oa.sub_(basis_out_Og @ core_ga)
    if out_gI is not None:
        left_gI = out_gI.sub_(core_ga @ basis_in_Ia.mT)
    return Parts(core_ga, right_Oa, left_gI)


def project_rows(
    matrix_oI: Tensor, basis_out_og: Tensor, basis_in_Ia: Tensor, d_out: int
) -> tuple[Tensor | None, Tensor]:
    """`project` where a rank may hold only some of the O = ``d_out`` rows, o of them.

    Returns:
        X U_A [..., o, a] (None where g = O and a < I), and what is a sum over rows, to be summed
        over ranks: U_Gᵀ X [..., g, I], or the core [..., g, a] where a = I.
    """
    full_in = basis_in_Ia.shape[-1] == basis_in_Ia.shape[-2]
    if basis_out_og.shape[-1] == d_out and not full_in:
        return None, basis_out_og.mT @ matrix_oI
    in_oa = matrix_oI @ basis_in_Ia
    return in_oa, basis_out_og.mT @ (in_oa if full_in else matrix_oI)


def split_rows(
    in_oa: Tensor | None, summed: Tensor, basis_out_og: Tensor, basis_in_Ia: Tensor, d_out: int
) -> Parts:
    """`split` from what `project_rows` yields, its second result summed; both are overwritten.

    Core and left part are whole, the right part has the o rows that are here."""
    batch, a = summed.shape[:-2], basis_in_Ia.shape[-1]
    if a == basis_in_Ia.shape[-2]:
        core_ga, left_gI = summed, summed.new_empty([*batch, summed.shape[-2], 0])
    else:
        core_ga = summed @ basis_in_Ia
        left_gI = summed.sub_(core_ga @ basis_in_Ia.mT)
    if in_oa is None or basis_out_og.shape[-1] == d_out:
        return Parts(core_ga, summed.new_empty([*batch, 0, a]), left_gI)
    return Parts(core_ga, in_oa.sub_(basis_out_og @ core_ga), left_gI)


class Energies(NamedTuple):
    """Of each matrix, 0-dim in float64: the mean square of its rest, and ‖C‖² + ‖R‖² + ‖L‖²."""

    rest_mean_squares: list[Tensor]
    inside: list[Tensor]


def energies(matrices_OI: Sequence[Tensor], parts: Sequence[Parts]) -> Energies:
    """The energy of each matrix's fourth part, without forming it, and of the other three.

    The difference ‖X‖² − ‖C‖² − ‖R‖² − ‖L‖² (Pythagoras) cancels, hence float64 beyond the rows of
    X and the clamp at 0; over the (O − g)(I − a) dimensions that the rest has.

    Args:
        matrices_OI: [O, I] each.
        parts: of `split`, with no part empty.
    """
    # Rows in the matrix's own precision: in float64 they take three times as long.
    rows = [torch.linalg.vector_norm(matrix, dim=-1) for matrix in matrices_OI]
    pieces = rows + [part for place in range(3) for part in (p[place] for p in parts)]
    norms = torch.stack(torch._foreach_norm(pieces, 2, torch.float64))
    squares = norms.square_().view(4, -1)
    inside = squares[1:].sum(0)
    rests = list(squares[0].sub_(inside).clamp_min_(0.0).unbind())
    dims = []
    for matrix, part in zip(matrices_OI, parts, strict=True):
        (d_out, d_in), (rank_out, rank_in) = matrix.shape, part.core_ga.shape
        dims.append(float((d_out - rank_out) * (d_in - rank_in)))
    torch._foreach_div_(rests, dims)
    return Energies(rests, list(inside.unbind()))
