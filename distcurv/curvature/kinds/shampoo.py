"""The kind ``shampoo``: the factor of each side and the root that its dimension is multiplied with.

The root is (factor + damping · I)⁻ᵖ, p = `BlockSpec.power`, by eigenvalues in float64; damping is
fixed at refresh and added to each side as it is (nothing is shared between the sides). The factor
is the mean of the statistics under `BlockSpec.decay`; where that is 1, nothing is forgotten, the
root is that of the *sum*: mean times weight (Gupta et al. 2018, Algorithm 2).

What is published holds the factor beside the root, so that a worker seeded from it goes on exactly.

Shape suffixes: B blocks of one shape, d the side's dimension, p = d(d+1)/2.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from distcurv.curvature.damping import split_damping
from distcurv.curvature.ema import ema_weights
from distcurv.curvature.inverse import DenseInverse
from distcurv.curvature.kinds.average import average, change, mean_of_sum
from distcurv.curvature.kinds.batch import (
    block_by_block,
    check_finite,
    counted_steps,
    keep_where_empty,
)
from distcurv.curvature.kinds.kind import Refreshed
from distcurv.curvature.kinds.sides import require_sides
from distcurv.curvature.roots import inverse_root
from distcurv.curvature.spec import MOST_SIDES, BlockSpec, Layout, Tensors
from distcurv.curvature.statistics import statistic_shapes
from distcurv.curvature.triangle import pack_triangle, triangle_size, unpack_triangle


class Shampoo:
    """See `distcurv.curvature.kinds.kind.Kind`.  Needs encoding ``dense``."""

    name = "shampoo"

    def statistic_layout(self, spec: BlockSpec) -> Layout:
        _require_sides(spec)
        return Layout(statistic_shapes(spec))

    def published_layout(self, spec: BlockSpec) -> Layout:
        _require_sides(spec)
        shapes: dict[str, tuple[int, ...]] = {}
        for name, side in spec.named_sides():
            shapes[f"{name}.packed"] = shapes[f"{name}.root"] = (triangle_size(side.dim),)
            shapes[f"{name}.weight"] = ()
        return Layout(shapes)

    def start(self, spec: BlockSpec, seed: int) -> Tensors:
        """The zero factor, and the identity for its root."""
        start: Tensors = {}
        for name, side in spec.named_sides():
            start[f"{name}.packed"] = torch.zeros(triangle_size(side.dim))
            start[f"{name}.root"] = pack_triangle(torch.eye(side.dim))
            start[f"{name}.weight"] = torch.zeros(())
        return start

    def seed(self, spec: BlockSpec, published: Tensors) -> Tensors:
        """All that is published."""
        return {name: published[name].clone() for name in self.published_layout(spec)}

    def refresh(
        self, spec: BlockSpec, state: Tensors, statistic: Tensors, basis: Tensors
    ) -> Refreshed:
        """As `Kind.refresh`; ``basis`` is not read, dense statistics are taken against none."""
        return block_by_block(partial(self._refresh, spec), state, statistic, {})

    def _refresh(
        self, spec: BlockSpec, state: Tensors, statistic: Tensors, _basis: Tensors
    ) -> Refreshed:
        steps_B = counted_steps(spec, statistic)
        some_B = steps_B > 0
        new: Tensors = {}
        changes = []
        for name, side in spec.named_sides():
            old_Bp, weight_B = state[f"{name}.packed"], state[f"{name}.weight"]
            shares = ema_weights(spec.decay, steps_B, weight_B)
            mean_Bp = mean_of_sum(statistic[f"{name}.packed"], statistic[f"{name}.count"])
            new_Bp = average(old_Bp, mean_Bp, shares)
            factor_Bdd = unpack_triangle(new_Bp.double(), side.dim)
            if spec.decay == 1.0:
                factor_Bdd = factor_Bdd * shares.weight[:, None, None]
            trace_B = factor_Bdd.diagonal(dim1=-2, dim2=-1).sum(-1)
            (damping_B,) = split_damping(spec.damping, [trace_B], [side.dim], spec.relative_damping)
            # A block that has seen nothing keeps its root: any damping will do.
            damping_B = torch.where(some_B, damping_B, damping_B + 1.0)
            root_Bdd = inverse_root(factor_Bdd, damping_B, spec.power)
            new[f"{name}.packed"] = new_Bp
            new[f"{name}.root"] = pack_triangle(root_Bdd).to(old_Bp.dtype)
            new[f"{name}.weight"] = shares.weight.to(weight_B.dtype)
            changes.append(change(old_Bp, mean_Bp, weight_B > 0))
        new = keep_where_empty(steps_B, new, state)
        check_finite(new, self.name)
        innovation_B = torch.stack(changes).amax(0).to(steps_B.dtype)
        return Refreshed(new, dict(new), torch.zeros_like(innovation_B), innovation_B)

    def inverses(
        self, spec: BlockSpec, published: Tensors, damping: float | Tensor, relative: bool
    ) -> tuple[DenseInverse, ...]:
        """The published roots; ``damping`` and ``relative`` are not read."""
        return tuple(
            DenseInverse(unpack_triangle(published[f"{name}.root"], side.dim))
            for name, side in spec.named_sides()
        )


def _require_sides(spec: BlockSpec) -> None:
    require_sides(spec, MOST_SIDES, ("dense",), powers=True)
