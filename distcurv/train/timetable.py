"""Which part of the exchange happens at which step: a pure function of the step number.

Every rank evaluates the same function on the same numbers, so all of them issue the same
collectives in the same order.  Nothing here looks at clocks, messages or other ranks.

One cycle of the asynchronous mode, s a multiple of T::

    s     POLL       all-reduce of "newest version resident at its owner" begins
    s+1   ANNOUNCE   the poll is read; owners begin to broadcast what it announced
    s+2   INSTALL    every rank switches; CLOSE: the window ends, its reduce begins
    s+3   POST       the owner hands the reduced statistics to its I/O thread

The window ends with the install, so all statistics of one window are against one basis and that
basis is the installed one.  For T < 4 all of it happens within step s.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from distcurv.config import ServiceConfig


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
        interval: T in steps.
        capture_interval: steps between two statistics.
        early_steps: length of the early phase in steps.
        early_interval: steps between two in-process refreshes of the early phase.
        install_delay: None (asynchronous) or k of the deterministic mode.
        inline: refreshes run in this process, so step() may wait for them before a poll.
    """

    interval: int
    capture_interval: int
    early_steps: int
    early_interval: int
    install_delay: int | None
    inline: bool

    @classmethod
    def from_config(cls, config: ServiceConfig, *, inline: bool) -> Timetable:
        """The timetable that a config asks for."""
        return cls(
            interval=config.preconditioner_upd_interval,
            capture_interval=config.resolved_curvature_upd_interval,
            early_steps=config.resolved_early_steps,
            early_interval=min(config.early_interval, config.preconditioner_upd_interval),
            install_delay=config.install_delay,
            inline=inline,
        )

    def is_early(self, step: int) -> bool:
        """Whether the step lies in the early phase."""
        return step < self.early_steps

    def capture_due(self, step: int) -> bool:
        """Whether statistics are taken at this step: at their interval, and at the end of the early
        windows and of the one that follows them, so that none is empty."""
        if step % self.capture_interval == 0:
            return True
        bridging = bool(self.early_steps) and step < self._first_sync() + self.interval
        return bridging and Action.CLOSE in self.plan(step).actions

    def plan(self, step: int) -> Plan:
        """What the exchange does at this step (counted from 0)."""
        if self.is_early(step):
            if step % self.early_interval:
                return _NOTHING
            return Plan(_CLOSE_POST + _SWITCH, True, None)
        if self.install_delay is not None:
            return self._deterministic(step, self.install_delay)
        return self._asynchronous(step)

    def _first_sync(self) -> int:
        """The first multiple of T outside the early phase."""
        return -(-self.early_steps // self.interval) * self.interval

    def _deterministic(self, step: int, delay: int) -> Plan:
        closes = step % self.interval == 0
        based_on = step - delay
        installs = based_on >= self._first_sync() and based_on % self.interval == 0
        if closes and installs and delay == 0:
            return Plan(_CLOSE_POST + _SWITCH, False, based_on)
        actions = (_SWITCH if installs else ()) + (_CLOSE_POST if closes else ())
        return Plan(actions, False, based_on if installs else None)

    def _asynchronous(self, step: int) -> Plan:
        phase = step % self.interval
        if step - phase < self._first_sync():
            return _NOTHING
        wait = (Action.AWAIT,) if self.inline else ()
        if self.interval < 4:
            if phase:
                return _NOTHING
            switch = (Action.POLL, Action.ANNOUNCE, Action.INSTALL)
            return Plan(wait + switch + _CLOSE_POST, False, None)
        cycle: dict[int, tuple[Action, ...]] = {
            0: (*wait, Action.POLL),
            1: (Action.ANNOUNCE,),
            2: (Action.INSTALL, Action.CLOSE),
            3: (Action.POST,),
        }
        return Plan(cycle.get(phase, ()), False, None)

    def install_step(self, poll_step: int) -> int:
        """The step at which what is polled at ``poll_step`` gets installed."""
        step = poll_step
        while Action.INSTALL not in self.plan(step).actions:
            step += 1
        return step
