"""`ServiceConfig`: what is common to all preconditioners that the curvature service serves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

from distcurv.config.checks import is_count, is_int, is_number, require
from distcurv.config.schedule import IntervalSchedule, description, value_at
from distcurv.curvature.spec import WIRE_DTYPES

STALENESS_POLICIES = ("keep", "fallback")
AUTO_ROWS_PER_RANK, MIN_AUTO_ROWS = 4, 128  # max_rows="auto"
MAX_HEARTBEAT = 5.0  # seconds; a service ends a session after 10 s of silence
MAX_DELAY_WINDOWS = 12  # windows between a statistic and its install; a service holds 16 bases


class Intervals(NamedTuple):
    """Steps between two installs of a block, and between two statistics."""

    preconditioner: int
    curvature: int


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """What is common to all preconditioners that the curvature service serves.

    Attributes:
        rank: r of every side; a side with d <= r takes its full basis.
        preconditioner_upd_interval: T, steps between two installs of a block; or a function of the
            step, called with the first step of each window.
        curvature_upd_interval: steps between two statistics, 1 <= it <= T; or a function, called
            as that of T.  None: T // 2.  Where one of the two intervals is a function, statistics
            are counted from the first step of each window, and ``install_delay`` must be None or
            0.
        statistics_at: whether statistics are taken at a step: a function of the step, which then
            rules alone.  None: by ``curvature_upd_interval``, and at the end of early windows.
        early_steps: first steps in which owners refresh in process and install in the same
            step.  None: 4 T, at least 40, for low-rank kinds, 0 for dense
            ones.
        early_interval: steps between two refreshes in the early phase (T where T is less).
        factor_decay: EMA decay rho of a factor per statistic step, 0 <= rho < 1.
        max_rows: statistics from activations read at most so many rows (tokens, positions) of each
            call, drawn anew at every step without bias.  ``auto``: 4 ``rank``, at least 128 (all
            rows for dense kinds).  None: all rows.
        encoding: how statistics travel: ``auto`` (fewer numbers) | ``sketch`` | ``dense``.
        wire_dtype: what sketches and the bases that come back for them travel as between owners
            and workers: ``float32``, or ``float16`` for half the bytes.  All ranks compute in
            float32 either way.  Everything else (counts, traces, diagonals, eigenvalues), dense
            statistics and other kinds than ``lowrank`` always travel as float32.
        install_delay: None for real asynchrony.  k >= 0 is the deterministic mode: after the
            early phase a version based on step t is installed exactly at t + k, and step()
            may wait for it.
        max_staleness: bound in steps; None means 10 T (and at least 2 T + 2 + install_delay), of
            the longer of two windows where T changes.
        staleness_policy: past the bound ``keep`` goes on with the old version, ``fallback``
            leaves the block to the base optimizer (`Preconditioner`) or refreshes it in
            process (`LowRankSOAP`).
        max_owners: at most so many ranks talk to workers.
        link_timeout: seconds of silence after which a session counts as lost; workers give a
            sign of life every second, so keep it well above that.
        heartbeat: seconds between two signs of life.
        wait_timeout: seconds that the modes which may wait (deterministic, in-process) wait
            for a version before they raise.
        check_replicas: compare a fingerprint of the gradients over ranks at every sync point.
        seed: seed of the random first bases, of the drawn rows and of ``mc`` samples.

    Where a function of the step stands for an interval, "T" of the other fields is its value at
    step 0.
    """

    rank: int = 16
    preconditioner_upd_interval: int | IntervalSchedule = 10
    curvature_upd_interval: int | IntervalSchedule | None = None
    statistics_at: Callable[[int], bool] | None = None
    early_steps: int | None = None
    early_interval: int = 2
    factor_decay: float = 0.95
    max_rows: int | str | None = "auto"
    encoding: str = "auto"
    wire_dtype: str = "float32"
    install_delay: int | None = None
    max_staleness: int | None = None
    staleness_policy: str = "keep"
    max_owners: int = 8
    link_timeout: float = 5.0
    heartbeat: float = 1.0
    wait_timeout: float = 120.0
    check_replicas: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("rank", "early_interval", "max_owners"):
            require(is_count(getattr(self, field)), self, field, "give an integer >= 1")
        interval = self.intervals(0).preconditioner
        for field in ("early_steps", "install_delay", "max_staleness"):
            value = getattr(self, field)
            require(
                value is None or (is_int(value) and value >= 0),
                self,
                field,
                "give None or an integer >= 0",
            )
        require(
            self.statistics_at is None or callable(self.statistics_at),
            self,
            "statistics_at",
            "give None or a function of the step",
        )
        require(
            (self.install_delay or 0) <= MAX_DELAY_WINDOWS * interval,
            self,
            "install_delay",
            f"give at most {MAX_DELAY_WINDOWS} times preconditioner_upd_interval ({interval}): "
            "services hold so many bases",
        )
        require(
            not self.install_delay or not self.intervals_vary,
            self,
            "install_delay",
            "an interval is a function of the step, and a delay needs windows of one length: give "
            "numbers as intervals, or install_delay=None or 0",
        )
        require(
            is_number(self.factor_decay) and 0 <= self.factor_decay < 1,
            self,
            "factor_decay",
            "give a number in [0, 1)",
        )
        rows = self.max_rows
        require(
            rows is None or rows == "auto" or is_count(rows),
            self,
            "max_rows",
            "use 'auto', None or an integer >= 1",
        )
        require(
            self.encoding in ("auto", "sketch", "dense"),
            self,
            "encoding",
            "use 'auto', 'sketch' or 'dense'",
        )
        require(
            self.wire_dtype in WIRE_DTYPES,
            self,
            "wire_dtype",
            f"use {' or '.join(map(repr, WIRE_DTYPES))}",
        )
        require(
            self.staleness_policy in STALENESS_POLICIES,
            self,
            "staleness_policy",
            "use 'keep' or 'fallback'",
        )
        for field in ("link_timeout", "heartbeat", "wait_timeout"):
            value = getattr(self, field)
            require(is_number(value) and value > 0, self, field, "give a number of seconds > 0")
        require(
            self.heartbeat < self.link_timeout,
            self,
            "heartbeat",
            f"give less than link_timeout ({self.link_timeout})",
        )
        require(
            self.heartbeat <= MAX_HEARTBEAT,
            self,
            "heartbeat",
            f"give at most {MAX_HEARTBEAT:g} s: services end a session after 10 s of silence",
        )
        require(isinstance(self.check_replicas, bool), self, "check_replicas", "give True or False")
        require(is_int(self.seed), self, "seed", "give an integer")

    # -- what changes with the step ---------------------------------------------------------

    @property
    def intervals_vary(self) -> bool:
        """Whether an interval is a function of the step."""
        return callable(self.preconditioner_upd_interval) or callable(self.curvature_upd_interval)

    def intervals(self, step: int) -> Intervals:
        """The intervals of a window that begins at ``step``.

        Raises `ConfigError` with the step and the value where a function gives none that works."""
        T = value_at(
            self.preconditioner_upd_interval,
            step,
            f"{type(self).__name__}.preconditioner_upd_interval",
            is_count,
            "give an integer >= 1",
        )
        if self.curvature_upd_interval is None:
            return Intervals(int(T), max(1, int(T) // 2))
        every = value_at(
            self.curvature_upd_interval,
            step,
            f"{type(self).__name__}.curvature_upd_interval",
            lambda value: is_count(value) and value <= T,  # type: ignore[operator]
            f"give None or an integer from 1 to preconditioner_upd_interval ({T})",
        )
        return Intervals(int(T), int(every))

    def staleness_bound(self, interval: int) -> int:
        """The bound on staleness in steps where T is ``interval``; by default with room for what
        the pipeline needs."""
        if self.max_staleness is not None:
            return self.max_staleness
        return max(10 * interval, 2 * interval + 2 + (self.install_delay or 0))

    def description(self) -> str:
        """All settings in words, the same on ranks that were given the same: as ``repr``, with
        functions by their names."""
        values = (f"{f.name}={description(getattr(self, f.name))}" for f in fields(self))
        return f"{type(self).__name__}({', '.join(values)})"

    # -- what None and auto stand for, at step 0 where it changes ----------------------------

    @property
    def resolved_preconditioner_upd_interval(self) -> int:
        """T, steps between two installs of a block."""
        return self.intervals(0).preconditioner

    @property
    def resolved_curvature_upd_interval(self) -> int:
        """Steps between two statistics; by default two statistics to a window."""
        return self.intervals(0).curvature

    @property
    def resolved_early_steps(self) -> int:
        """The length of the early phase in steps."""
        if self.early_steps is None:
            return max(4 * self.resolved_preconditioner_upd_interval, 40)
        return self.early_steps

    @property
    def resolved_max_rows(self) -> int | None:
        """The most rows of a call that are read; None for all."""
        if isinstance(self.max_rows, str):
            return max(MIN_AUTO_ROWS, AUTO_ROWS_PER_RANK * self.rank)
        return self.max_rows

    @property
    def resolved_max_staleness(self) -> int:
        """The bound on staleness in steps."""
        return self.staleness_bound(self.resolved_preconditioner_upd_interval)
