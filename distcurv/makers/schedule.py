"""At which steps curvature and preconditioner are updated: pure functions of the step.

The intervals and ratios are ASDL's, see `PreconditioningConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distcurv.errors import ConfigError

INTERVAL_CONSTANT = "constant"
INTERVAL_STEP = "step"
INTERVAL_LINEAR = "linear"
INTERVAL_TYPES = (INTERVAL_CONSTANT, INTERVAL_STEP, INTERVAL_LINEAR)


def get_update_schedule(
    num_total_steps: int,
    update_ratio: float = 1.0,
    warmup_ratio: float = 0.0,
    interval_type: str = INTERVAL_CONSTANT,
    reverse: bool = False,
) -> list[bool]:
    """Whether there is an update, for each of ``num_total_steps`` steps.

    Exactly ``int(num_total_steps · update_ratio)`` steps have one; the first
    ``int(num_total_steps · warmup_ratio)`` of them are the first steps.  The others are spread over
    the rest:

    * ``constant``: at equal distances, as well as integers allow;
    * ``step``: all at its beginning, then no more;
    * ``linear``: at distances that grow linearly, the first of them 1, the last update at the last
      step (two updates are at the first and the last step).

    Args:
        reverse: the schedule backwards.

    Raises `ConfigError` for numbers out of range.
    """
    if not isinstance(num_total_steps, int) or num_total_steps < 1:
        raise ConfigError(f"num_total_steps is {num_total_steps!r}: give an integer >= 1")
    for name, ratio in (("update_ratio", update_ratio), ("warmup_ratio", warmup_ratio)):
        if not 0 <= ratio <= 1:
            raise ConfigError(f"{name} is {ratio}: give a number from 0 to 1")
    if interval_type not in INTERVAL_TYPES:
        raise ConfigError(f"interval_type is {interval_type!r}: use {', '.join(INTERVAL_TYPES)}")
    updates = int(num_total_steps * update_ratio)
    warmup = int(num_total_steps * warmup_ratio)
    if warmup > updates:
        raise ConfigError(
            f"warmup_ratio {warmup_ratio} means {warmup} updates: more than the {updates} of "
            f"update_ratio {update_ratio}"
        )
    rest = num_total_steps - warmup
    schedule = [True] * warmup + [False] * rest
    for place in _places(rest, updates - warmup, interval_type):
        schedule[warmup + place] = True
    return schedule[::-1] if reverse else schedule


def _places(steps: int, updates: int, interval_type: str) -> list[int]:
    """Where the updates are among so many steps; all of them different, the first at 0."""
    if interval_type == INTERVAL_STEP or updates <= 1:
        return list(range(updates))
    if interval_type == INTERVAL_CONSTANT:
        return [i * steps // updates for i in range(updates)]
    gaps = updates - 1
    if gaps == 1:
        return [0, steps - 1]
    # Distances 1, 1 + a, 1 + 2a, ... that add up to the last step; in integers, so that exactly.
    growth, parts = steps - 1 - gaps, gaps * (gaps - 1)
    return [i + growth * i * (i - 1) // parts for i in range(updates)]


@dataclass(frozen=True)
class UpdateTimes:
    """Whether there is an update at a step.

    Attributes:
        schedule: for each step; after its end there is none.  None: by interval.
        interval: in steps, counted from the end of the warm-up.
        warmup_steps: all of the first so many steps have one.
    """

    schedule: Sequence[bool] | None
    interval: int
    warmup_steps: int

    def due(self, step: int) -> bool:
        """At this step, counted from 0."""
        if self.schedule is not None:
            return step < len(self.schedule) and self.schedule[step]
        return step < self.warmup_steps or (step - self.warmup_steps) % self.interval == 0
