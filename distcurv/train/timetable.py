"""Which part of the exchange happens at which step: a pure function of the step number.

Every rank evaluates the same function on the same numbers, so all of them issue the same
collectives in the same order.  Nothing here looks at clocks, messages or other ranks.

One cycle of the asynchronous mode, s a multiple of T::

    s     POLL       all-reduce of "newest version resident at its owner" begins
    s+1   ANNOUNCE   the poll is read; owners begin to broadcast what it announced
    s+2   INSTALL    every rank switches; CLOSE: the window ends, its reduce begins
    s+3   POST       the owner hands the reduced statistics to its I/O thread

The window ends with the install, so all statistics of one window are against one basis and that
basis is the installed one.  For T < 4 all of it happens within step s.  Where T is a function of
the step, s is the first step of a cycle (`distcurv.train.cycles`), and the next one is s + T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from distcurv.config import ServiceConfig
from distcurv.train.cycles import Cycles


class Action(Enum):
    """One thing that step() does for the exchange."""

    CLOSE = "close"
    POST = "post"
    AWAIT = "await"
    POLL = "poll"
    ANNOUNCE = "announce"
    INSTALL = "install"


class Plan(NamedTuple):
    """What one step does.

    ``actions`` in order.  ``early``: the window is refreshed in process.  ``based_on``: install
    only versions based on this step or earlier (None: the newest resident).
    """

    actions: tuple[Action, ...]
    early: bool
    based_on: int | None

    @property
    def together(self) -> bool:
        """Whether a collective begins and ends within the step: all ranks must be in it."""
        actions = set(self.actions)
        return {Action.CLOSE, Action.POST} <= actions or {Action.POLL, Action.ANNOUNCE} <= actions


_CLOSE_POST = (Action.CLOSE, Action.POST)
_SWITCH = (Action.AWAIT, Action.POLL, Action.ANNOUNCE, Action.INSTALL)
_NOTHING = Plan((), False, None)


@dataclass(frozen=True)
class Timetable:
    """The exchange's rhythm.

    Attributes:
        cycles: the windows after the early phase, and when statistics are due in them.
        early_steps: length of the early phase in steps.
        early_interval: steps between two in-process refreshes of the early phase.
        install_delay: None (asynchronous) or k of the deterministic mode, in which all cycles are
            of one length unless k is 0.
        inline: refreshes run in this process, so step() may wait for them before a poll.
        first_sync: the first step of a cycle outside the early phase.
        bridged_until: the end of the cycle that begins there.
        statistics_at: whether statistics are due at a step, where cycles do not say it.
    """

    cycles: Cycles
    early_steps: int
    early_interval: int
    install_delay: int | None
    inline: bool
    first_sync: int
    bridged_until: int
    statistics_at: Callable[[int], bool] | None = None

    @classmethod
    def from_config(cls, config: ServiceConfig, *, inline: bool) -> Timetable:
        """The timetable that a config asks for."""
        cycles = Cycles(config)
        first = cycles.first_from(config.resolved_early_steps)
        return cls(
            cycles=cycles,
            early_steps=config.resolved_early_steps,
            early_interval=min(config.early_interval, config.resolved_preconditioner_upd_interval),
            install_delay=config.install_delay,
            inline=inline,
            first_sync=first.start,
            bridged_until=first.start + first.interval,
            statistics_at=config.statistics_at,
        )

    def is_early(self, step: int) -> bool:
        """Whether the step lies in the early phase."""
        return step < self.early_steps

    def capture_due(self, step: int) -> bool:
        """Whether statistics are taken at this step: at their interval, and at the end of the early
        windows and of the one that follows them, so that none is empty; or as ``statistics_at``
        says."""
        if self.statistics_at is not None:
            return self.statistics_at(step)
        if self.cycles.at(step).capture_due(step):
            return True
        bridging = bool(self.early_steps) and step < self.bridged_until
        return bridging and Action.CLOSE in self.plan(step).actions

    def staleness_bound(self, step: int) -> int:
        """The bound on staleness in steps that holds at a step."""
        return self.cycles.at(step).staleness_bound

    def plan(self, step: int) -> Plan:
        """What the exchange does at this step (counted from 0)."""
        if self.is_early(step):
            if step % self.early_interval:
                return _NOTHING
            return Plan(_CLOSE_POST + _SWITCH, True, None)
        if self.install_delay is not None:
            return self._deterministic(step, self.install_delay)
        return self._asynchronous(step)

    def _deterministic(self, step: int, delay: int) -> Plan:
        closes = self.cycles.at(step).start == step
        based_on = step - delay
        installs = based_on >= self.first_sync and self.cycles.at(based_on).start == based_on
        if closes and installs and delay == 0:
            return Plan(_CLOSE_POST + _SWITCH, False, based_on)
        actions = (_SWITCH if installs else ()) + (_CLOSE_POST if closes else ())
        return Plan(actions, False, based_on if installs else None)

    def _asynchronous(self, step: int) -> Plan:
        cycle = self.cycles.at(step)
        phase = step - cycle.start
        if cycle.start < self.first_sync:
            return _NOTHING
        wait = (Action.AWAIT,) if self.inline else ()
        if cycle.interval < 4:
            if phase:
                return _NOTHING
            switch = (Action.POLL, Action.ANNOUNCE, Action.INSTALL)
            return Plan(wait + switch + _CLOSE_POST, False, None)
        actions: dict[int, tuple[Action, ...]] = {
            0: (*wait, Action.POLL),
            1: (Action.ANNOUNCE,),
            2: (Action.INSTALL, Action.CLOSE),
            3: (Action.POST,),
        }
        return Plan(actions.get(phase, ()), False, None)

    def install_step(self, poll_step: int) -> int:
        """The step at which what is polled at ``poll_step`` gets installed."""
        step = poll_step
        while Action.INSTALL not in self.plan(step).actions:
            step += 1
        return step
