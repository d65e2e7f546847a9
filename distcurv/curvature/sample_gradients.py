"""Statistics of per-sample gradients: of a block's gradient for each sample alone.

Kronecker statistics need the rows of inputs and of output gradients, never their product; a Fisher
matrix, its diagonal and the second moments in an eigenbasis do.

Shape suffixes: n samples, O output features, I input features (with the bias coordinate), P = O I
numbers of the block, u units of dimension m.
"""

from __future__ import annotations

from torch import Tensor

from distcurv.curvature.precision import at_least_float32, full_float32
from distcurv.curvature.spec import ONE_SIDE, BlockSpec, Tensors
from distcurv.curvature.triangle import pack_triangle
from distcurv.errors import ShapeError

# A block with two sides, of the kind that takes second moments in its eigenbasis.
EIGENBASIS = "kfe"
SQUARES = "S.squares"  # what it takes beside the statistics of the sides


def encode_samples(spec: BlockSpec, grads_nP: Tensor, basis: Tensors) -> Tensors:
    """The sums over samples that only per-sample gradients can make, without counts.

    Args:
        spec: a block with one side of encoding ``dense`` or ``diagonal``, or of kind ``kfe``.
        grads_nP: the gradient of each sample's loss, the rows of its matrix [O, I] one after the
            other; any float dtype, sums are taken in float32 (or float64).
        basis: for ``kfe`` the published tensors of the version to project on (``A.U``, ``G.U``).

    Returns:
        ``F.packed`` or ``F.diag``; for ``kfe`` ``S.squares`` [O, I].

    Raises:
        ShapeError: the gradients do not fit the block.
    """
    with full_float32(grads_nP.device):
        return _encoded(spec, at_least_float32(grads_nP), basis)


def _encoded(spec: BlockSpec, grads_nP: Tensor, basis: Tensors) -> Tensors:
    if spec.kind == EIGENBASIS:
        side_A, side_G = spec.sides
        _require_numbers(spec, grads_nP, side_A.dim * side_G.dim)
        grads_nOI = grads_nP.reshape(-1, side_G.dim, side_A.dim)
        U_II, U_OO = (basis[f"{name}.U"].to(grads_nP.dtype) for name in ("A", "G"))
        return {SQUARES: (U_OO.mT @ grads_nOI @ U_II).square().sum(0)}
    (side,) = spec.sides
    _require_numbers(spec, grads_nP, side.units * side.dim)
    if side.encoding == "diagonal":
        return {f"{ONE_SIDE}.diag": grads_nP.square().sum(0)}
    rows_unm = grads_nP.reshape(-1, side.units, side.dim).movedim(0, 1)
    return {f"{ONE_SIDE}.packed": pack_triangle(rows_unm.mT @ rows_unm).flatten()}


def _require_numbers(spec: BlockSpec, grads_nP: Tensor, numbers: int) -> None:
    if grads_nP.dim() != 2 or grads_nP.shape[1] != numbers:
        raise ShapeError(
            f"encode_samples got gradients of shape {tuple(grads_nP.shape)} for block "
            f"{spec.name!r} of kind {spec.kind!r}: it has {numbers} numbers, give [n, {numbers}]"
        )
