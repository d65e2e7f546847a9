"""The kind ``dense``: classical K-FAC with Cholesky inverses, the exact reference.

The worker's state is the EMA of the packed factors; what is published are the packed inverses of
the damped factors, so damping is fixed at refresh (`BlockSpec.damping`), not at apply time. A side
that is a diagonal by nature (encoding ``diagonal``) keeps and publishes its d entries.

Accuracy. Factorisation and inverse are float64 throughout (this kind is what the others are held
against); the published inverse is rounded to float32 once, a relative error of 6e-8 in its largest
entries. A worker seeded from published tensors gets the factor back as inverse⁻¹ − damping · I: its
error is about 6e-8 · κ · (lam_max + damping) with κ = (lam_max + damping)/(lam_min + damping), so
at a relative damping of 1e-3 about four digits hold. The EMA forgets that error like old data.

Shape suffixes: B blocks of one shape, d the side's dimension, p = d(d+1)/2, or d for a diagonal.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from distcurv.curvature.damping import split_damping
from distcurv.curvature.ema import ema_weights
from distcurv.curvature.inverse import FLOOR, DenseInverse, Inverse, LowRankInverse
from distcurv.curvature.kinds.average import average, change, mean_of_sum, require_not_negative
from distcurv.curvature.kinds.batch import (
    block_by_block,
    check_finite,
    counted_steps,
    keep_where_empty,
)
from distcurv.curvature.kinds.kind import Refreshed
from distcurv.curvature.kinds.sides import require_sides
from distcurv.curvature.spec import BlockSpec, Layout, SideSpec, Tensors
from distcurv.curvature.statistics import statistic_shapes
from distcurv.curvature.triangle import (
    diagonal_of_triangle,
    pack_triangle,
    triangle_size,
    unpack_triangle,
)
from distcurv.errors import NumericsError


class Dense:
    """See `distcurv.curvature.kinds.kind.Kind`.  Needs encoding ``dense`` or ``diagonal``."""

    name = "dense"

    def statistic_layout(self, spec: BlockSpec) -> Layout:
        require_sides(spec, 2, ("dense", "diagonal"))
        return Layout(statistic_shapes(spec))

    def published_layout(self, spec: BlockSpec) -> Layout:
        require_sides(spec, 2, ("dense", "diagonal"))
        shapes: dict[str, tuple[int, ...]] = {}
        for name, side in spec.named_sides():
            size = side.dim if _is_diagonal(side) else triangle_size(side.dim)
            shapes[f"{name}.inverse"] = (size,)
            shapes[f"{name}.trace"] = ()
            shapes[f"{name}.damping"] = ()
            shapes[f"{name}.weight"] = ()
        return Layout(shapes)

    def start(self, spec: BlockSpec, seed: int) -> Tensors:
        """The inverse of 0 + 1 · I, so that `seed` finds the zero factor in it."""
        start: Tensors = {}
        for name, side in spec.named_sides():
            start[f"{name}.inverse"] = (
                torch.ones(side.dim) if _is_diagonal(side) else pack_triangle(torch.eye(side.dim))
            )
            start[f"{name}.trace"] = torch.zeros(())
            start[f"{name}.damping"] = torch.ones(())
            start[f"{name}.weight"] = torch.zeros(())
        return start

    def seed(self, spec: BlockSpec, published: Tensors) -> Tensors:
        """The factor, ``s.packed`` or ``s.diag`` [B, p], and ``s.weight`` [B].

        Raises `NumericsError` where a published inverse is not positive definite."""
        state: Tensors = {}
        for name, side in spec.named_sides():
            inverse_Bp = published[f"{name}.inverse"]
            damping_B = published[f"{name}.damping"]
            weight_B = published[f"{name}.weight"]
            if _is_diagonal(side):
                factor_Bp = 1.0 / _require_positive(inverse_Bp.double(), name)
                factor_Bp = (factor_Bp - damping_B.double().unsqueeze(-1)).clamp_(min=0)
            else:
                factor_Bdd = _inverse(unpack_triangle(inverse_Bp.double(), side.dim), name)
                factor_Bdd.diagonal(dim1=-2, dim2=-1).sub_(damping_B.double().unsqueeze(-1))
                factor_Bp = pack_triangle(factor_Bdd)
            factor_Bp = torch.where(weight_B.unsqueeze(-1) > 0, factor_Bp, 0.0)
            state[_factor(name, side)] = factor_Bp.to(inverse_Bp.dtype)
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
        for name, side in spec.named_sides():
            key = _factor(name, side)
            old_Bp, weight_B = state[key], state[f"{name}.weight"]
            shares = ema_weights(spec.decay, steps_B, weight_B)
            if _is_diagonal(side):
                require_not_negative(statistic[key], f"the diagonal of side {name}")
            mean_Bp = mean_of_sum(statistic[key], statistic[f"{name}.count"])
            new[key] = average(old_Bp, mean_Bp, shares)
            new[f"{name}.weight"] = shares.weight.to(weight_B.dtype)
            changes.append(change(old_Bp, mean_Bp, weight_B > 0))
        new = keep_where_empty(steps_B, new, state)
        check_finite(new, self.name)
        innovation_B = torch.stack(changes).amax(0).to(steps_B.dtype)
        return Refreshed(
            new, self._publish(spec, new), torch.zeros_like(innovation_B), innovation_B
        )

    def inverses(
        self, spec: BlockSpec, published: Tensors, damping: float | Tensor, relative: bool
    ) -> tuple[Inverse, ...]:
        inverses: list[Inverse] = []
        for name, side in spec.named_sides():
            inverse = published[f"{name}.inverse"]
            if _is_diagonal(side):
                inverses.append(_floored(inverse, published[f"{name}.damping"]))
            else:
                inverses.append(DenseInverse(unpack_triangle(inverse, side.dim)))
        return tuple(inverses)

    def _publish(self, spec: BlockSpec, state: Tensors) -> Tensors:
        traces = [_trace(side, state[_factor(name, side)]) for name, side in spec.named_sides()]
        dims = [side.dim for side in spec.sides]
        dampings = split_damping(spec.damping, traces, dims, spec.relative_damping)
        published: Tensors = {}
        for (name, side), trace_B, damping_B in zip(
            spec.named_sides(), traces, dampings, strict=True
        ):
            factor_Bp, weight_B = state[_factor(name, side)], state[f"{name}.weight"]
            # A block that has seen nothing keeps the identity of `start`.
            damping_B = torch.where(weight_B > 0, damping_B, 1.0)
            if _is_diagonal(side):
                damped_Bp = factor_Bp.double() + damping_B.unsqueeze(-1)
                inverse_Bp = 1.0 / _require_positive(damped_Bp, name)
            else:
                damped_Bdd = unpack_triangle(factor_Bp.double(), side.dim)
                damped_Bdd.diagonal(dim1=-2, dim2=-1).add_(damping_B.unsqueeze(-1))
                inverse_Bp = pack_triangle(_inverse(damped_Bdd, name))
            dtype = factor_Bp.dtype
            published[f"{name}.inverse"] = inverse_Bp.to(dtype)
            published[f"{name}.trace"] = trace_B.to(dtype)
            published[f"{name}.damping"] = damping_B.to(dtype)
            published[f"{name}.weight"] = weight_B.clone()
        check_finite(published, self.name)
        return published


def _is_diagonal(side: SideSpec) -> bool:
    return side.encoding == "diagonal"


def _factor(name: str, side: SideSpec) -> str:
    """Where the factor stands, in the state as in the statistic."""
    return f"{name}.diag" if _is_diagonal(side) else f"{name}.packed"


def _trace(side: SideSpec, factor_Bp: Tensor) -> Tensor:
    if _is_diagonal(side):
        return factor_Bp.double().sum(-1)
    return diagonal_of_triangle(factor_Bp.double(), side.dim).sum(-1)


def _floored(inverse_d: Tensor, damping: Tensor) -> LowRankInverse:
    """A published diagonal with the floor `FLOOR` times the factor's largest entry.

    Done where it is applied and not where it is published, so that no entry is lost to a seed."""
    damped_1 = 1.0 / inverse_d.amin(-1, keepdim=True).double()
    largest_1 = (damped_1 - damping.double().unsqueeze(-1)).clamp(min=0)
    floored_d = torch.minimum(inverse_d.double(), 1.0 / (FLOOR * largest_1))
    return LowRankInverse(floored_d.to(inverse_d.dtype), inverse_d.new_empty(*inverse_d.shape, 0))


def _require_positive(entries_Bd: Tensor, name: str) -> Tensor:
    if bool((entries_Bd <= 0).any()):
        raise NumericsError(
            f"side {name}: a damped diagonal of kind 'dense' is not positive: raise the damping"
        )
    return entries_Bd


def _inverse(matrix_Bdd: Tensor, name: str) -> Tensor:
    chol_Bdd, info_B = torch.linalg.cholesky_ex(matrix_Bdd)
    if bool((info_B > 0).any()):
        raise NumericsError(
            f"side {name}: {int((info_B > 0).sum())} damped factor(s) of kind 'dense' are not "
            f"positive definite in float64: raise the damping"
        )
    return torch.cholesky_inverse(chol_Bdd)
