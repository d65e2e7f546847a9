"""Which learning rates a method tries: the same number for every method, on one lattice for all.

The lattice is 1e-3·1.5^k, k any whole number.  A method starts at its own k (`STARTS`, the same for
all tasks) and tries k, k − 4 and k + 4 (a factor of 5 apart); then the best one's neighbours at 2,
then at 1.  With 7 points that ends at the best of the lattice and both its neighbours wherever the
loss has one valley, up to a factor of 17 from the start.  Pure: what comes next depends on the
losses known so far and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

FACTOR = 1.5
_BASE = 1e-3
_SPACINGS = (4, 2, 1)

STARTS: Mapping[str, int] = {
    "sgd": 9,
    "adamw": 3,
    "muon": 5,
    "soap": 3,
    "shampoo": 3,
    "asdl-kfac": 11,
    "lowrank-soap": 4,
    "kfac": 7,
}


def learning_rate(k: int) -> float:
    """The lattice's k-th learning rate, to three digits."""
    return float(f"{_BASE * FACTOR**k:.3g}")


def best(tried: Mapping[int, float]) -> int:
    """The k of the lowest loss; the lowest k where all are infinite (all diverged)."""
    return min(tried, key=lambda k: (tried[k], k))


def next_points(start: int, budget: int, tried: Mapping[int, float]) -> list[int]:
    """The points to try next, none when the budget is used up.

    Args:
        start: the method's k.
        budget: how many points may be tried in all.
        tried: losses by k; a divergence, infinity.
    """
    points = [start, start - _SPACINGS[0], start + _SPACINGS[0]][:budget]
    stage = 1
    while all(k in tried for k in points) and len(points) < budget:
        spacing = _SPACINGS[min(stage, len(_SPACINGS) - 1)]
        middle = best({k: tried[k] for k in points})
        fresh = [k for k in (middle - spacing, middle + spacing) if k not in points]
        if stage >= len(_SPACINGS) - 1 and not fresh:
            # The valley is found: what is left of the budget widens the curve around it.
            distance = 1
            while not fresh:
                distance += 1
                fresh = [k for k in (middle - distance, middle + distance) if k not in points]
        points += fresh[: budget - len(points)]
        stage += 1
    return [k for k in points if k not in tried]


def tried_so_far(
    start: int, budget: int, loss_at: Callable[[int], float | None]
) -> dict[int, float]:
    """Losses by k of those points of the search that are known.

    Args:
        start, budget: as in `next_points`.
        loss_at: the loss at k; infinity for a divergence, None where it is not known yet.
    """
    losses: dict[int, float] = {}
    while True:
        fresh = {k: loss_at(k) for k in next_points(start, budget, losses)}
        found = {k: loss for k, loss in fresh.items() if loss is not None}
        if not found:
            return losses
        losses.update(found)


def loss_of(result: Mapping[str, Any] | None) -> float | None:
    """A training's final loss as the search ranks it; None where there is no result yet."""
    if result is None:
        return None
    final: float | None = result["final"]
    return math.inf if final is None else final
