"""The kind ``lowrank``: what is published is the factor's whole state.

Each side is a basis, its eigenvalues, a tail, the exact trace and the EMA weight. The ranks take
sketches against the basis, or dense statistics where those are smaller, and read damping at apply
time. At full rank (r = d) the basis is the exact eigenbasis. A side that is a diagonal by nature
(encoding ``diagonal``) is its tail alone.
"""

from __future__ import annotations

import hashlib
from functools import partial

import torch
from torch import Tensor

from distcurv.curvature.damping import split_damping
from distcurv.curvature.ema import EmaWeights, ema_weights
from distcurv.curvature.estimate import Estimate
from distcurv.curvature.inverse import Inverse, invert_diagonal, invert_low_rank
from distcurv.curvature.kinds.average import average, change, mean_of_sum, require_not_negative
from distcurv.curvature.kinds.batch import (
    block_by_block,
    check_finite,
    counted_steps,
    keep_where_empty,
)
from distcurv.curvature.kinds.kind import Refreshed
from distcurv.curvature.kinds.sides import require_sides
from distcurv.curvature.lowrank import Products, SideRefresh, refresh_side
from distcurv.curvature.narrow import HALF_STEP
from distcurv.curvature.spec import MOST_SIDES, BlockSpec, Layout, SideSpec, Tensors
from distcurv.curvature.statistics import statistic_shapes


class LowRank:
    """See `distcurv.curvature.kinds.kind.Kind`."""

    name = "lowrank"

    def statistic_layout(self, spec: BlockSpec) -> Layout:
        _require_sides(spec)
        return Layout(statistic_shapes(spec), [f"{name}.Y" for name in _narrow_sides(spec)])

    def published_layout(self, spec: BlockSpec) -> Layout:
        _require_sides(spec)
        shapes: dict[str, tuple[int, ...]] = {}
        for name, side in spec.named_sides():
            if side.rank:
                shapes[f"{name}.U"] = (side.dim, side.rank)
                shapes[f"{name}.lam"] = (side.rank,)
            if side.tail != "none":
                shapes[f"{name}.tail"] = (1,) if side.tail == "isotropic" else (side.dim,)
            shapes[f"{name}.trace"] = ()
            shapes[f"{name}.weight"] = ()
        return Layout(shapes, [f"{name}.U" for name in _narrow_sides(spec)])

    def start(self, spec: BlockSpec, seed: int) -> Tensors:
        start = {
            name: torch.zeros(shape) for name, shape in self.published_layout(spec).shapes.items()
        }
        for name, side in spec.named_sides():
            if side.rank:
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
        products = Products(spec.max_itr, spec.tolerance)
        narrow = _narrow_sides(spec)
        new: Tensors = {}
        uncaptured, innovation = [], []
        for i, (name, side) in enumerate(spec.named_sides()):
            weight_B = weights[i]
            shares = EmaWeights(*(share[i] for share in all_shares))
            own = {
                key.removeprefix(f"{name}."): value
                for key, value in statistic.items()
                if key.startswith(f"{name}.")
            }
            old, known_B = side_estimate(side, name, state), weight_B > 0
            if side.rank:
                Q_Bdr = basis[f"{name}.U"]
                noise = HALF_STEP if name in narrow else 0.0
                side_refresh = refresh_side(side, old, known_B, own, Q_Bdr, shares, products, noise)
            else:
                side_refresh = _refresh_diagonal(name, old, known_B, own, shares)
            estimate = side_refresh.estimate
            if side.rank:
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
        # Of a block that no statistic has come of the gradient stays as it is.
        known = [published[f"{name}.weight"] > 0 for name, _ in spec.named_sides()]
        dampings = tuple(
            torch.where(one, own, 1.0) for one, own in zip(known, dampings, strict=True)
        )
        return tuple(
            invert_low_rank(estimate, own) if side.rank else invert_diagonal(_tail(estimate), own)
            for side, estimate, own in zip(spec.sides, estimates, dampings, strict=True)
        )


def side_estimate(side: SideSpec, name: str, tensors: Tensors) -> Estimate:
    """One side's `Estimate` [...] from state or published tensors; r = 0 for a diagonal side."""
    tail = None if side.tail == "none" else tensors[f"{name}.tail"]
    trace = tensors[f"{name}.trace"]
    if not side.rank:
        return Estimate(
            trace.new_empty(*trace.shape, side.dim, 0),
            trace.new_empty(*trace.shape, 0),
            tail,
            trace,
        )
    return Estimate(tensors[f"{name}.U"], tensors[f"{name}.lam"], tail, trace)


def _narrow_sides(spec: BlockSpec) -> list[str]:
    """The sides whose sketch and basis travel as float16."""
    if spec.wire_dtype == "float32":
        return []
    return [name for name, side in spec.named_sides() if side.encoding == "sketch"]


def _require_sides(spec: BlockSpec) -> None:
    require_sides(spec, MOST_SIDES, ("sketch", "dense", "diagonal"))


def _refresh_diagonal(
    name: str, old: Estimate, known_B: Tensor, statistic: Tensors, shares: EmaWeights
) -> SideRefresh:
    """`refresh_side` for a side that is a diagonal: nothing of it is approximated."""
    require_not_negative(statistic["diag"], f"the diagonal of side {name}")
    old_Bd = _tail(old)
    mean_Bd = mean_of_sum(statistic["diag"], statistic["count"])
    new_Bd = average(old_Bd, mean_Bd, shares)
    trace_B = new_Bd.double().sum(-1).to(old_Bd.dtype)
    innovation_B = change(old_Bd, mean_Bd, known_B).to(old_Bd.dtype)
    return SideRefresh(
        old._replace(tail=new_Bd, trace=trace_B), torch.zeros_like(trace_B), innovation_B
    )


def _tail(estimate: Estimate) -> Tensor:
    assert estimate.tail is not None  # `SideSpec` sees to it
    return estimate.tail


def _random_basis(side: SideSpec, text: str) -> Tensor:
    """An orthonormal [d, r], the same on every rank: drawn and orthonormalised on the CPU."""
    digest = hashlib.sha256(text.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    random_dr = torch.randn(side.dim, side.rank, generator=generator, dtype=torch.float64)
    Q_dr: Tensor = torch.linalg.qr(random_dr).Q
    return Q_dr.float()
