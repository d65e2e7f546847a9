"""What the kinds of one-sided blocks share: state, published whole, is the statistic's average.

There is no basis, nothing is approximated, and damping is read at apply time.

Shape suffixes: B blocks of one shape, d units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distcurv.curvature.damping import split_damping
from distcurv.curvature.ema import ema_weights
from distcurv.curvature.kinds.average import average, change, mean_of_sum
from distcurv.curvature.kinds.batch import (
    block_by_block,
    check_finite,
    counted_steps,
    keep_where_empty,
)
from distcurv.curvature.kinds.kind import Refreshed
from distcurv.curvature.kinds.sides import require_sides
from distcurv.curvature.spec import ONE_SIDE, BlockSpec, Layout, Tensors
from distcurv.curvature.statistics import statistic_shapes


class Averaged:
    """Base of such kinds; a subclass names itself, its entries and their inverse."""

    name: str
    encoding: str
    entries: tuple[str, ...]  # of the statistic and of what is published, (d) each
    squares: tuple[str, ...]  # those that sum to the trace

    def check(self, statistic: Tensors) -> None:
        """Raise `NumericsError` for a statistic [B, ...] that is no sum of products."""
        raise NotImplementedError

    def statistic_layout(self, spec: BlockSpec) -> Layout:
        require_sides(spec, 1, (self.encoding,))
        return Layout(statistic_shapes(spec))

    def published_layout(self, spec: BlockSpec) -> Layout:
        require_sides(spec, 1, (self.encoding,))
        shapes: dict[str, tuple[int, ...]] = {
            f"{ONE_SIDE}.{entry}": (spec.sides[0].dim,) for entry in self.entries
        }
        return Layout(shapes | {f"{ONE_SIDE}.weight": ()})

    def start(self, spec: BlockSpec, seed: int) -> Tensors:
        """Zeros: there is nothing to draw."""
        return {
            name: torch.zeros(shape) for name, shape in self.published_layout(spec).shapes.items()
        }

    def seed(self, spec: BlockSpec, published: Tensors) -> Tensors:
        return {name: published[name].clone() for name in self.published_layout(spec)}

    def refresh(
        self, spec: BlockSpec, state: Tensors, statistic: Tensors, basis: Tensors
    ) -> Refreshed:
        """As `Kind.refresh`; ``basis`` is not read."""

        def one(state: Tensors, statistic: Tensors, _basis: Tensors) -> Refreshed:
            return self._refresh(spec, state, statistic)

        return block_by_block(one, state, statistic, {})

    def _refresh(self, spec: BlockSpec, state: Tensors, statistic: Tensors) -> Refreshed:
        self.check(statistic)
        names = [f"{ONE_SIDE}.{entry}" for entry in self.entries]
        weight_B = state[f"{ONE_SIDE}.weight"]
        steps_B = counted_steps(spec, statistic)
        shares = ema_weights(spec.decay, steps_B, weight_B)
        count_B = statistic[f"{ONE_SIDE}.count"]
        old_Bp = torch.cat([state[name] for name in names], -1)
        mean_Bp = mean_of_sum(torch.cat([statistic[name] for name in names], -1), count_B)
        new_Bp = average(old_Bp, mean_Bp, shares)
        parts = torch.split(new_Bp, spec.sides[0].dim, -1)
        new = dict(zip(names, parts, strict=True))
        new[f"{ONE_SIDE}.weight"] = shares.weight.to(weight_B.dtype)
        new = keep_where_empty(steps_B, new, state)
        check_finite(new, self.name)
        innovation_B = change(old_Bp, mean_Bp, weight_B > 0).to(weight_B.dtype)
        return Refreshed(new, dict(new), torch.zeros_like(innovation_B), innovation_B)

    def damping_of(
        self, spec: BlockSpec, published: Tensors, damping: float | Tensor, relative: bool
    ) -> Tensor:
        """The whole of the damping [...] in float64; ``relative``: times trace / d."""
        trace = sum(published[f"{ONE_SIDE}.{entry}"].double().sum(-1) for entry in self.squares)
        assert isinstance(trace, Tensor)
        return split_damping(damping, [trace], [spec.sides[0].dim], relative)[0]
