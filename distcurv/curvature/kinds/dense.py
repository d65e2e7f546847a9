"""The kind ``dense``: classical K-FAC with Cholesky inverses, the exact reference.

The worker's state is the EMA of the packed factors; what is published are the packed inverses of
the damped factors, so damping is fixed at refresh (`BlockSpec.damping`), not at apply time.

Accuracy. Factorisation and inverse are float64 throughout (this kind is what the others are held
against); the published inverse is rounded to float32 once, a relative error of 6e-8 in its largest
entries. A worker seeded from published tensors gets the factor back as inverse⁻¹ − damping · I: its
error is about 6e-8 · κ · (lam_max + damping) with κ = (lam_max + damping)/(lam_min + damping), so
at a relative damping of 1e-3 about four digits hold. The EMA forgets that error like old data.

Shape suffixes: B blocks of one shape, d the side's dimension, p = d(d+1)/2.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from distcurv.curvature.damping import split_damping
from distcurv.curvature.ema import EmaWeights, ema_weights
from distcurv.curvature.inverse import DenseInverse, Inverse
from distcurv.curvature.kinds.batch import (
    block_by_block,
    check_finite,
    counted_steps,
    keep_where_empty,
)
from distcurv.curvature.kinds.kind import Refreshed
from distcurv.curvature.spec import BlockSpec, Layout, SideSpec, Tensors
from distcurv.curvature.statistics import statistic_shapes
from distcurv.curvature.triangle import (
    diagonal_of_triangle,
    pack_triangle,
    triangle_size,
    unpack_triangle,
)
from distcurv.errors import NumericsError, ShapeError


class Dense:
    """See `distcurv.curvature.kinds.kind.Kind`.  Needs ``encoding="dense"`` on both sides."""

    name = "dense"

    def statistic_layout(self, spec: BlockSpec) -> Layout:
        for name, side in spec.named_sides():
            if side.encoding != "dense":
                raise ShapeError(
                    f"side {name} of block {spec.name!r} has encoding {side.encoding!r}: the kind "
                    f"'dense' needs 'dense' there"
                )
        return Layout(statistic_shapes(spec))

    def published_layout(self, spec: BlockSpec) -> Layout:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, side in spec.named_sides():
            shapes[f"{name}.inverse"] = (triangle_size(side.dim),)
            shapes[f"{name}.trace"] = ()
            shapes[f"{name}.damping"] = ()
            shapes[f"{name}.weight"] = ()
        return Layout(shapes)

    def start(self, spec: BlockSpec, seed: int) -> Tensors:
        """The inverse of 0 + 1 · I, so that `seed` finds the zero factor in it."""
        start: Tensors = {}
        for name, side in spec.named_sides():
            start[f"{name}.inverse"] = pack_triangle(torch.eye(side.dim))
            start[f"{name}.trace"] = torch.zeros(())
            start[f"{name}.damping"] = torch.ones(())
            start[f"{name}.weight"] = torch.zeros(())
        return start

    def seed(self, spec: BlockSpec, published: Tensors) -> Tensors:
        """``s.packed`` [B, p], the factor, and ``s.weight`` [B].

        Raises `NumericsError` where a published inverse is not positive definite."""
        state: Tensors = {}
        for name, side in spec.named_sides():
            inverse_Bp = published[f"{name}.inverse"]
            damping_B = published[f"{name}.damping"]
            weight_B = published[f"{name}.weight"]
            factor_Bdd = _inverse(unpack_triangle(inverse_Bp.double(), side.dim), name)
            factor_Bdd.diagonal(dim1=-2, dim2=-1).sub_(damping_B.double().unsqueeze(-1))
            packed_Bp = pack_triangle(factor_Bdd).to(inverse_Bp.dtype)
            state[f"{name}.packed"] = torch.where(weight_B.unsqueeze(-1) > 0, packed_Bp, 0.0)
            state[f"{name}.weight"] = weight_B.clone()
        return state

    def refresh(
        self, spec: BlockSpec, state: Tensors, statistic: Tensors, basis: Tensors
    ) -> Refreshed:
        """As `Kind.refresh`; ``basis`` is not read, dense statistics are taken against none."""
        return block_by_block(partial(self._refresh, spec), state, statistic, {})

    def _refresh(
        self, spec: BlockSpec, state: Tensors, statistic: Tensors, _basis: Tensors
    ) -> Refreshed:
        steps_B = counted_steps(spec, statistic)
        new: Tensors = {}
        changes = []
        for name, _ in spec.named_sides():
            old_Bp, weight_B = state[f"{name}.packed"], state[f"{name}.weight"]
            shares = ema_weights(spec.decay, steps_B, weight_B)
            count_B = statistic[f"{name}.count"].double()
            mean_Bp = statistic[f"{name}.packed"].double() / torch.where(
                count_B > 0, count_B, 1.0
            ).unsqueeze(-1)
            new[f"{name}.packed"] = _average(old_Bp, mean_Bp, shares)
            new[f"{name}.weight"] = shares.weight.to(weight_B.dtype)
            changes.append(_innovation(old_Bp, mean_Bp, weight_B > 0))
        new = keep_where_empty(steps_B, new, state)
        check_finite(new, self.name)
        innovation_B = torch.stack(changes).amax(0).to(steps_B.dtype)
        return Refreshed(
            new, self._publish(spec, new), torch.zeros_like(innovation_B), innovation_B
        )

    def inverses(
        self, spec: BlockSpec, published: Tensors, damping: float | Tensor, relative: bool
    ) -> tuple[Inverse, ...]:
        return tuple(
            DenseInverse(unpack_triangle(published[f"{name}.inverse"], side.dim))
            for name, side in spec.named_sides()
        )

    def _publish(self, spec: BlockSpec, state: Tensors) -> Tensors:
        traces = [_trace(side, state[f"{name}.packed"]) for name, side in spec.named_sides()]
        dims = [side.dim for side in spec.sides]
        dampings = split_damping(spec.damping, traces, dims, spec.relative_damping)
        published: Tensors = {}
        for (name, side), trace_B, damping_B in zip(
            spec.named_sides(), traces, dampings, strict=True
        ):
            packed_Bp, weight_B = state[f"{name}.packed"], state[f"{name}.weight"]
            # A block that has seen nothing keeps the identity of `start`.
            damping_B = torch.where(weight_B > 0, damping_B, 1.0)
            damped_Bdd = unpack_triangle(packed_Bp.double(), side.dim)
            damped_Bdd.diagonal(dim1=-2, dim2=-1).add_(damping_B.unsqueeze(-1))
            dtype = packed_Bp.dtype
            published[f"{name}.inverse"] = pack_triangle(_inverse(damped_Bdd, name)).to(dtype)
            published[f"{name}.trace"] = trace_B.to(dtype)
            published[f"{name}.damping"] = damping_B.to(dtype)
            published[f"{name}.weight"] = weight_B.clone()
        check_finite(published, self.name)
        return published


def _average(old_Bp: Tensor, mean_Bp: Tensor, shares: EmaWeights) -> Tensor:
    a_B1, b_B1 = shares.old_share.unsqueeze(-1), shares.new_share.unsqueeze(-1)
    return (a_B1 * old_Bp.double() + b_B1 * mean_Bp).to(old_Bp.dtype)


def _innovation(old_Bp: Tensor, mean_Bp: Tensor, known_B: Tensor) -> Tensor:
    """‖mean − old‖/‖mean‖ over the packed entries, cut at 1e6; −1 where there was no old."""
    change_B = (mean_Bp - old_Bp.double()).norm(dim=-1)
    size_B = torch.maximum(mean_Bp.norm(dim=-1), 1e-6 * change_B).clamp(min=1e-300)
    return torch.where(known_B, change_B / size_B, -1.0)


def _trace(side: SideSpec, packed_Bp: Tensor) -> Tensor:
    return diagonal_of_triangle(packed_Bp.double(), side.dim).sum(-1)


def _inverse(matrix_Bdd: Tensor, name: str) -> Tensor:
    chol_Bdd, info_B = torch.linalg.cholesky_ex(matrix_Bdd)
    if bool((info_B > 0).any()):
        raise NumericsError(
            f"side {name}: {int((info_B > 0).sum())} damped factor(s) of kind 'dense' are not "
            f"positive definite in float64: raise the damping"
        )
    return torch.cholesky_inverse(chol_Bdd)
