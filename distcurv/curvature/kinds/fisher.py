"""The kinds ``layer_wise``, ``unit_rows`` and ``full``: Fisher matrices that are no product of two.

The factor is the mean of v vᵀ over the samples, v being per-sample gradients: of all numbers of one
layer (``layer_wise``), of each row of its matrix by itself (``unit_rows``, one matrix for each
output), or of all layers together (``full``). The block's gradient is a column of all numbers.

Damping is fixed at refresh (`BlockSpec.damping`), and added as it is. Factorisation and inverse are
float64; what is published is rounded to float32 once, so that a direction errs by about 1e-7 times
the largest eigenvalue over the damping. The factor is published beside its inverse,
so that a worker seeded from it goes on exactly: these matrices have at most as many directions as
samples were seen, so the factor cannot be had back from a rounded inverse.

Shape suffixes: B blocks of one shape, u units, d the side's dimension, p = u d(d+1)/2.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from distcurv.curvature.damping import split_damping
from distcurv.curvature.ema import ema_weights
from distcurv.curvature.kinds.average import average, change, mean_of_sum, require_not_negative
from distcurv.curvature.kinds.batch import (
    block_by_block,
    check_finite,
    counted_steps,
    keep_where_empty,
)
from distcurv.curvature.kinds.kind import Refreshed
from distcurv.curvature.kinds.sides import require_sides
from distcurv.curvature.one_sided import MatricesInverse
from distcurv.curvature.spec import ONE_SIDE, BlockSpec, Layout, SideSpec, Tensors
from distcurv.curvature.statistics import statistic_shapes
from distcurv.curvature.triangle import pack_triangle, triangle_size, unpack_triangle
from distcurv.errors import NumericsError, ShapeError

_PACKED, _INVERSE = f"{ONE_SIDE}.packed", f"{ONE_SIDE}.inverse"
_COUNT, _WEIGHT = f"{ONE_SIDE}.count", f"{ONE_SIDE}.weight"


class FisherMatrices:
    """See `distcurv.curvature.kinds.kind.Kind`.  Needs one side of encoding ``dense``.

    Args:
        name: of the kind.
        several: whether the side may have several units.
    """

    def __init__(self, name: str, *, several: bool = False) -> None:
        self.name = name
        self._several = several

    def statistic_layout(self, spec: BlockSpec) -> Layout:
        self._require(spec)
        return Layout(statistic_shapes(spec))

    def published_layout(self, spec: BlockSpec) -> Layout:
        self._require(spec)
        size = spec.sides[0].units * triangle_size(spec.sides[0].dim)
        return Layout({_PACKED: (size,), _INVERSE: (size,), _WEIGHT: ()})

    def start(self, spec: BlockSpec, seed: int) -> Tensors:
        """The zero factor, and the identity for its inverse."""
        side = spec.sides[0]
        identity_p = pack_triangle(torch.eye(side.dim)).repeat(side.units)
        return {
            _PACKED: torch.zeros_like(identity_p),
            _INVERSE: identity_p,
            _WEIGHT: torch.zeros(()),
        }

    def seed(self, spec: BlockSpec, published: Tensors) -> Tensors:
        """All that is published."""
        return {name: published[name].clone() for name in self.published_layout(spec)}

    def refresh(
        self, spec: BlockSpec, state: Tensors, statistic: Tensors, basis: Tensors
    ) -> Refreshed:
        """As `Kind.refresh`; ``basis`` is not read."""
        return block_by_block(partial(self._refresh, spec), state, statistic, {})

    def _refresh(
        self, spec: BlockSpec, state: Tensors, statistic: Tensors, _basis: Tensors
    ) -> Refreshed:
        (side,) = spec.sides
        steps_B = counted_steps(spec, statistic)
        old_Bp, weight_B = state[_PACKED], state[_WEIGHT]
        shares = ema_weights(spec.decay, steps_B, weight_B)
        mean_Bp = mean_of_sum(statistic[_PACKED], statistic[_COUNT])
        new_Bp = average(old_Bp, mean_Bp, shares)
        matrices_Budd = _matrices(new_Bp.double(), side)
        diagonal_Bud = matrices_Budd.diagonal(dim1=-2, dim2=-1)
        require_not_negative(diagonal_Bud, f"the diagonal of a factor of kind {self.name!r}")
        trace_B = diagonal_Bud.sum((-2, -1))
        numbers = side.units * side.dim
        (damping_B,) = split_damping(spec.damping, [trace_B], [numbers], spec.relative_damping)
        # A block that has seen nothing keeps its inverse: any damping will do.
        damping_B = torch.where(steps_B > 0, damping_B, 1.0 + trace_B)
        damped_Budd = matrices_Budd.clone()
        damped_Budd.diagonal(dim1=-2, dim2=-1).add_(damping_B[:, None, None])
        new = {
            _PACKED: new_Bp,
            _INVERSE: _packed(_inverse(damped_Budd, self.name)).to(new_Bp.dtype),
            _WEIGHT: shares.weight.to(weight_B.dtype),
        }
        new = keep_where_empty(steps_B, new, state)
        check_finite(new, self.name)
        innovation_B = change(old_Bp, mean_Bp, weight_B > 0).to(steps_B.dtype)
        return Refreshed(new, dict(new), torch.zeros_like(innovation_B), innovation_B)

    def inverses(
        self, spec: BlockSpec, published: Tensors, damping: float | Tensor, relative: bool
    ) -> tuple[MatricesInverse]:
        """The published inverses; ``damping`` and ``relative`` are not read."""
        return (MatricesInverse(_matrices(published[_INVERSE], spec.sides[0])),)

    def _require(self, spec: BlockSpec) -> None:
        require_sides(spec, 1, ("dense",))
        if spec.sides[0].units > 1 and not self._several:
            raise ShapeError(
                f"block {spec.name!r} has {spec.sides[0].units} units: the kind {self.name!r} has "
                "one matrix alone; use 'unit_rows'"
            )


def _matrices(packed_p: Tensor, side: SideSpec) -> Tensor:
    """[..., u, d, d]"""
    shape = (*packed_p.shape[:-1], side.units, triangle_size(side.dim))
    return unpack_triangle(packed_p.reshape(shape), side.dim)


def _packed(matrices_udd: Tensor) -> Tensor:
    """[..., p]"""
    return pack_triangle(matrices_udd).flatten(-2)


def _inverse(matrices_dd: Tensor, kind: str) -> Tensor:
    chol_dd, info = torch.linalg.cholesky_ex(matrices_dd)
    if bool((info > 0).any()):
        raise NumericsError(
            f"{int((info > 0).sum())} damped matrices of kind {kind!r} are not positive definite "
            f"in float64: raise the damping"
        )
    return torch.cholesky_inverse(chol_dd)
