"""The cycles of the exchange: from one poll to the next, T steps each, T of each its own.

With intervals that are functions of the step, a cycle's T is what the function says of its first
step.  So the cycles follow from one another, from step 0 on, and which one a step lies in is still
a function of the step number alone: a run that goes on from a checkpoint finds the same ones.
"""

from __future__ import annotations

from typing import NamedTuple

from distcurv.config import ServiceConfig


class Cycle(NamedTuple):
    """One cycle.

    Attributes:
        start: its first step.
        interval: T, its length in steps.
        capture_interval: steps between two statistics.
        capture_origin: the step from which those are counted.
        staleness_bound: in steps.
    """

    start: int
    interval: int
    capture_interval: int
    capture_origin: int
    staleness_bound: int

    def capture_due(self, step: int) -> bool:
        """Whether a statistic is due at a step of the cycle."""
        return (step - self.capture_origin) % self.capture_interval == 0


class Cycles:
    """The cycles that a config asks for.

    Only the one that was asked for last and the one before it are kept, so that memory does not
    grow; asking for an earlier step begins anew at step 0.  Raises `ConfigError` where a function
    gives an interval that cannot work.
    """

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        self._varies = config.intervals_vary
        self._first = self._before = self._last = self._cycle(0, 0)

    def _cycle(self, start: int, interval_before: int) -> Cycle:
        T, every = self._config.intervals(start)
        origin = start if self._varies else 0
        bound = self._config.staleness_bound(max(T, interval_before))
        return Cycle(start, T, every, origin, bound)

    def at(self, step: int) -> Cycle:
        """The cycle that a step (counted from 0) lies in."""
        if not self._varies:
            return self._first._replace(start=step - step % self._first.interval)
        if self._before.start <= step < self._last.start:
            return self._before
        if step < self._last.start:
            self._last = self._first
        while step >= self._last.start + self._last.interval:
            self._before = self._last
            start = self._last.start + self._last.interval
            self._last = self._cycle(start, self._last.interval)
        return self._last

    def first_from(self, step: int) -> Cycle:
        """The first cycle that does not begin before a step."""
        cycle = self.at(step)
        return cycle if cycle.start == step else self.at(cycle.start + cycle.interval)
