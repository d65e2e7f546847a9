"""The statistic of one backward from the calls of a block that it went through.

Several calls of one backward are more positions of the same samples (Eschenhagen et al. 2023):
inputs are averaged over them, output gradients added, and the samples count once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distcurv.curvature.kinds import KINDS
from distcurv.curvature.sample_gradients import SQUARES
from distcurv.curvature.spec import SIDE_NAMES, Tensors
from distcurv.curvature.triangle import diagonal_of_triangle
from distcurv.train.calls import Call
from distcurv.train.sample_statistics import samples_statistic

_SAMPLES = ("G.count", "F.count")


def joined(calls: Sequence[Call]) -> Tensors:
    """One statistic of complete calls of one micro-batch, in float32.

    Where a weight is both an embedding's and an output head's, the Fisher is a sum of two
    Kronecker products, of which one is kept.  The embedding's is first brought to the other's
    ratio of the sides' traces: the ratio is free in a product, and in the sum it decides how much
    the mixed products A1 x G2 weigh; equal ratios leave the total trace below twice the true one.
    """
    plain = [call.statistic() for call in calls if not call.use.swapped]
    swapped = [call.statistic() for call in calls if call.use.swapped]
    if plain:
        total = _sum(plain, once=_SAMPLES)
        if swapped:
            _add_balanced(total, _sum(swapped, once=("A.count",)))
    else:
        total = _sum(swapped, once=("A.count",))
    return total | _of_samples(calls, total) if calls[0].use.per_sample else total


def _of_samples(calls: Sequence[Call], made: Tensors) -> Tensors:
    """What per-sample gradients make, of all calls together, beside what is ``made`` already (for
    the Fisher types ``mc`` and ``exact`` all of it, where any logits depend on a call)."""
    spec, some = calls[0].block.spec, next(iter(made.values()))
    shown = [call.shown for call in calls if call.shown is not None]
    if not shown:
        shapes = KINDS[spec.kind].statistic_layout(spec).shapes
        return {
            key: some.new_zeros(shape)
            for key, shape in shapes.items()
            if key not in made and key != "steps"
        }
    sums = samples_statistic(spec, shown, calls[0].bases)
    told = calls[0].micro_batch.told(some.device)
    if told is None:
        return {key: value.float() for key, value in sums.items()}
    # The mean over no terms is NaN.
    return {key: torch.where(told[0] > 0, value.float(), 0.0) for key, value in sums.items()}


def _sum(statistics: Sequence[Tensors], once: tuple[str, ...]) -> Tensors:
    total = dict(statistics[0])
    for statistic in statistics[1:]:
        for name, value in statistic.items():
            if name not in total:
                total[name] = value
            elif name in once:
                total[name] = torch.maximum(total[name], value)
            else:
                total[name] = total[name] + value
    return total


def _add_balanced(total: Tensors, other: Tensors) -> None:
    traces = [_trace(statistic, side) for statistic in (total, other) for side in SIDE_NAMES]
    own_A, own_G, other_A, other_G = (trace.double() for trace in traces)
    ratio = own_A * other_G / (own_G * other_A)
    # Without a gradient on either side there is nothing to balance, and nothing to add.
    root = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1.0).sqrt().float()
    for name, value in other.items():
        if name == SQUARES:  # of no side
            total[name] = total[name] + value if name in total else value
        elif not name.endswith(".count"):
            scale = root if name.startswith("A.") else 1.0 / root
            total[name] = total[name] + scale * value


def _trace(statistic: Tensors, side: str) -> Tensor:
    if f"{side}.trace" in statistic:
        return statistic[f"{side}.trace"]
    if f"{side}.diag" in statistic:
        return statistic[f"{side}.diag"].sum()
    packed_p = statistic[f"{side}.packed"]
    d = int(((8 * len(packed_p) + 1) ** 0.5 - 1) / 2)
    return diagonal_of_triangle(packed_p, d).sum()
