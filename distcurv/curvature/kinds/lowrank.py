"""The kind ``lowrank``: what is published is the factor's whole state.

Each side is a basis, its eigenvalues, a tail, the exact trace and the EMA weight. The ranks take
sketches against the basis, or dense statistics where those are smaller, and read damping at apply
time. At full rank (r = d) the basis is the exact eigenbasis.
"""

from __future__ import annotations

import hashlib
from functools import partial

import torch
from torch import Tensor

from distcurv.curvature.damping import split_damping
from distcurv.curvature.ema import EmaWeights, ema_weights
from distcurv.curvature.estimate import Estimate
from distcurv.curvature.inverse import Inverse, invert_low_rank
from distcurv.curvature.kinds.batch import (
    block_by_block,
    check_finite,
    counted_steps,
    keep_where_empty,
)
from distcurv.curvature.kinds.kind import Refreshed
from distcurv.curvature.lowrank import refresh_side
from distcurv.curvature.spec import BlockSpec, Layout, SideSpec, Tensors
from distcurv.curvature.statistics import statistic_shapes


class LowRank:
    """See `distcurv.curvature.kinds.kind.Kind`."""

    name = "lowrank"

    def statistic_layout(self, spec: BlockSpec) -> Layout:
        return Layout(statistic_shapes(spec))

    def published_layout(self, spec: BlockSpec) -> Layout:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, side in spec.named_sides():
            shapes[f"{name}.U"] = (side.dim, side.rank)
            shapes[f"{name}.lam"] = (side.rank,)
            if side.tail != "none":
                shapes[f"{name}.tail"] = (1,) if side.tail == "isotropic" else (side.dim,)
            shapes[f"{name}.trace"] = ()
            shapes[f"{name}.weight"] = ()
        return Layout(shapes)

    def start(self, spec: BlockSpec, seed: int) -> Tensors:
        start = {
            name: torch.zeros(shape) for name, shape in self.published_layout(spec).shapes.items()
        }
        for name, side in spec.named_sides():
            start[f"{name}.U"] = _random_basis(side, f"{seed}/{spec.name}/{name}")
        return start

    def seed(self, spec: BlockSpec, published: Tensors) -> Tensors:
        return {name: published[name].clone() for name in self.published_layout(spec)}

    def refresh(
        self, spec: BlockSpec, state: Tensors, statistic: Tensors, basis: Tensors
    ) -> Refreshed:
        return block_by_block(partial(self._refresh, spec), state, statistic, basis)

    def _refresh(
        self, spec: BlockSpec, state: Tensors, statistic: Tensors, basis: Tensors
    ) -> Refreshed:
        steps_B = counted_steps(spec, statistic)
        weights = [state[f"{name}.weight"] for name, _ in spec.named_sides()]
        all_shares = ema_weights(spec.decay, steps_B, torch.stack(weights))  # [sides, B]
        new: Tensors = {}
        uncaptured, innovation = [], []
        for i, (name, side) in enumerate(spec.named_sides()):
            old, weight_B = side_estimate(side, name, state), weights[i]
            shares = EmaWeights(*(share[i] for share in all_shares))
            own = {
                key.removeprefix(f"{name}."): value
                for key, value in statistic.items()
                if key.startswith(f"{name}.")
            }
            side_refresh = refresh_side(side, old, weight_B > 0, own, basis[f"{name}.U"], shares)
            estimate = side_refresh.estimate
            new[f"{name}.U"] = estimate.U_dr
            new[f"{name}.lam"] = estimate.lam_r
            if estimate.tail is not None:
                new[f"{name}.tail"] = estimate.tail
            new[f"{name}.trace"] = estimate.trace
            new[f"{name}.weight"] = shares.weight.to(weight_B.dtype)
            uncaptured.append(side_refresh.uncaptured)
            innovation.append(side_refresh.innovation)
        refreshed = keep_where_empty(steps_B, new, state)
        check_finite(refreshed, self.name)
        return Refreshed(
            refreshed,
            dict(refreshed),
            torch.stack(uncaptured).amax(0),
            torch.stack(innovation).amax(0),
        )

    def inverses(
        self, spec: BlockSpec, published: Tensors, damping: float | Tensor, relative: bool
    ) -> tuple[Inverse, ...]:
        estimates = [side_estimate(side, name, published) for name, side in spec.named_sides()]
        dampings = split_damping(
            damping,
            [estimate.trace for estimate in estimates],
            [side.dim for side in spec.sides],
            relative,
        )
        return tuple(
            invert_low_rank(estimate, own)
            for estimate, own in zip(estimates, dampings, strict=True)
        )


def side_estimate(side: SideSpec, name: str, tensors: Tensors) -> Estimate:
    """One side's `Estimate` [...] from state or published tensors."""
    tail = None if side.tail == "none" else tensors[f"{name}.tail"]
    return Estimate(tensors[f"{name}.U"], tensors[f"{name}.lam"], tail, tensors[f"{name}.trace"])


def _random_basis(side: SideSpec, text: str) -> Tensor:
    """An orthonormal [d, r], the same on every rank: drawn and orthonormalised on the CPU."""
    digest = hashlib.sha256(text.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    random_dr = torch.randn(side.dim, side.rank, generator=generator, dtype=torch.float64)
    Q_dr: Tensor = torch.linalg.qr(random_dr).Q
    return Q_dr.float()
