"""Every setting and its default, in frozen dataclasses that are validated once, when made.

`ServiceConfig` holds what every preconditioner shares (rank, intervals, staleness, links);
`SoapConfig` and `KfacConfig` add what belongs to one rule.  A value that cannot work raises
`ConfigError` at once, naming the field, the value and what to do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from distcurv.errors import ConfigError

STALENESS_POLICIES = ("keep", "fallback")
AUTO_ROWS_PER_RANK, MIN_AUTO_ROWS = 4, 256  # max_rows="auto"
MAX_HEARTBEAT = 5.0  # seconds; a service ends a session after 10 s of silence
MAX_DELAY_WINDOWS = 12  # windows between a statistic and its install; a service holds 16 bases


def require(ok: bool, owner: object, field: str, want: str) -> None:
    """Raise `ConfigError` naming ``owner``'s ``field`` and its value unless ``ok``."""
    if not ok:
        value = getattr(owner, field)
        raise ConfigError(f"{type(owner).__name__}.{field} is {value!r}: {want}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """What is common to all preconditioners that the curvature service serves.

    Attributes:
        rank: r of every side; a side with d <= r takes its full basis.
        preconditioner_upd_interval: T, steps between two installs of a block.
        curvature_upd_interval: steps between two statistics, 1 <= it <= T.  None: T // 2.
        early_steps: first steps in which owners refresh in process and install in the same
            step.  None: 4 T, at least 40, for low-rank kinds, 0 for dense
            ones.
        early_interval: steps between two refreshes in the early phase (T where T is less).
        factor_decay: EMA decay rho of a factor per statistic step, 0 <= rho < 1.
        max_rows: statistics from activations read at most so many rows (tokens, positions) of each
            call, drawn anew at every step without bias.  ``auto``: 4 ``rank``, at least 256 (all
            rows for dense kinds).  None: all rows.
        encoding: how statistics travel: ``auto`` (fewer bytes) | ``sketch`` | ``dense``.
        install_delay: None for real asynchrony.  k >= 0 is the deterministic mode: after the
            early phase a version based on step t is installed exactly at t + k, and step()
            may wait for it.
        max_staleness: bound in steps; None means 10 T (and at least 2 T + 2 + install_delay).
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
    """

    rank: int = 16
    preconditioner_upd_interval: int = 10
    curvature_upd_interval: int | None = None
    early_steps: int | None = None
    early_interval: int = 2
    factor_decay: float = 0.95
    max_rows: int | str | None = "auto"
    encoding: str = "auto"
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
        for field in ("rank", "preconditioner_upd_interval", "early_interval", "max_owners"):
            value = getattr(self, field)
            require(_is_int(value) and value >= 1, self, field, "give an integer >= 1")
        interval = self.preconditioner_upd_interval
        every = self.curvature_upd_interval
        require(
            every is None or (_is_int(every) and 1 <= every <= interval),
            self,
            "curvature_upd_interval",
            f"give None or an integer from 1 to preconditioner_upd_interval ({interval})",
        )
        for field in ("early_steps", "install_delay", "max_staleness"):
            value = getattr(self, field)
            require(
                value is None or (_is_int(value) and value >= 0),
                self,
                field,
                "give None or an integer >= 0",
            )
        require(
            (self.install_delay or 0) <= MAX_DELAY_WINDOWS * interval,
            self,
            "install_delay",
            f"give at most {MAX_DELAY_WINDOWS} times preconditioner_upd_interval ({interval}): "
            "services hold so many bases",
        )
        require(
            _is_number(self.factor_decay) and 0 <= self.factor_decay < 1,
            self,
            "factor_decay",
            "give a number in [0, 1)",
        )
        rows = self.max_rows
        require(
            rows is None or rows == "auto" or (_is_int(rows) and rows >= 1),  # type: ignore[operator]
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
            self.staleness_policy in STALENESS_POLICIES,
            self,
            "staleness_policy",
            "use 'keep' or 'fallback'",
        )
        for field in ("link_timeout", "heartbeat", "wait_timeout"):
            value = getattr(self, field)
            require(_is_number(value) and value > 0, self, field, "give a number of seconds > 0")
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
        require(_is_int(self.seed), self, "seed", "give an integer")

    @property
    def resolved_curvature_upd_interval(self) -> int:
        """Steps between two statistics; by default two statistics to a window."""
        if self.curvature_upd_interval is None:
            return max(1, self.preconditioner_upd_interval // 2)
        return self.curvature_upd_interval

    @property
    def resolved_early_steps(self) -> int:
        """The length of the early phase in steps."""
        if self.early_steps is None:
            return max(4 * self.preconditioner_upd_interval, 40)
        return self.early_steps

    @property
    def resolved_max_rows(self) -> int | None:
        """The most rows of a call that are read; None for all."""
        if isinstance(self.max_rows, str):
            return max(MIN_AUTO_ROWS, AUTO_ROWS_PER_RANK * self.rank)
        return self.max_rows

    @property
    def resolved_max_staleness(self) -> int:
        """The bound on staleness in steps; by default with room for what the pipeline needs."""
        interval = self.preconditioner_upd_interval
        if self.max_staleness is not None:
            return self.max_staleness
        return max(10 * interval, 2 * interval + 2 + (self.install_delay or 0))


@dataclass(frozen=True, kw_only=True)
class SoapConfig(ServiceConfig):
    """Settings of `distcurv.optim.LowRankSOAP` beyond its param-group options.

    Attributes:
        source: where statistics come from: ``gradient`` | ``activations``.
    """

    rank: int = 64
    preconditioner_upd_interval: int = 5
    source: str = "gradient"
    factor_decay: float = 0.9
    staleness_policy: str = "fallback"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.source in ("gradient", "activations"),
            self,
            "source",
            "use 'gradient' or 'activations'",
        )


@dataclass(frozen=True, kw_only=True)
class KfacConfig(ServiceConfig):
    """Settings of `distcurv.Preconditioner`.

    Attributes:
        kind: ``lowrank`` or ``dense`` (Cholesky inverse, the exact reference).
        damping: delta > 0.
        damping_form: ``absolute`` (pi-split of delta) or ``relative`` (a multiple kappa of each
            side's mean eigenvalue).
        tail_in, tail_out: tails of the input and output side: ``none | isotropic | diagonal``.
        kl_clip: bound of the update's KL norm, None for no clipping.  Needs ``lr``.
        lr: learning rate that ``kl_clip`` uses unless ``step(lr=...)`` gives one.
        graft: scale each block's direction to its gradient's norm.
        fisher_type: ``empirical`` | ``mc``.
        loss_reduction: ``mean`` (over samples) | ``sum``, as the user's loss does it.
        accumulation: micro-batches per step; the loss is divided by it.
        weight_sharing: ``expand`` | ``reduce``.
        ignore_modules: instances, classes or name substrings that are left alone.
    """

    rank: int = 64
    kind: str = "lowrank"
    damping: float = 1e-3
    damping_form: str = "absolute"
    tail_in: str = "isotropic"
    tail_out: str = "diagonal"
    kl_clip: float | None = None
    lr: float | None = None
    graft: bool = False
    fisher_type: str = "empirical"
    loss_reduction: str = "mean"
    accumulation: int = 1
    weight_sharing: str = "expand"
    ignore_modules: tuple[object, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {
            "kind": ("lowrank", "dense"),
            "damping_form": ("absolute", "relative"),
            "tail_in": ("none", "isotropic", "diagonal"),
            "tail_out": ("none", "isotropic", "diagonal"),
            "fisher_type": ("empirical", "mc"),
            "loss_reduction": ("mean", "sum"),
            "weight_sharing": ("expand", "reduce"),
        }
        for field, allowed in choices.items():
            require(
                getattr(self, field) in allowed, self, field, f"use one of {', '.join(allowed)}"
            )
        require(_is_number(self.damping) and self.damping > 0, self, "damping", "give a number > 0")
        for field in ("kl_clip", "lr"):
            value = getattr(self, field)
            require(
                value is None or (_is_number(value) and value > 0),
                self,
                field,
                "give None or a number > 0",
            )
        require(
            not (self.graft and self.kl_clip is not None),
            self,
            "graft",
            "kl_clip and graft exclude each other: choose one",
        )
        require(
            _is_int(self.accumulation) and self.accumulation >= 1,
            self,
            "accumulation",
            "give an integer >= 1",
        )

    @property
    def resolved_early_steps(self) -> int:
        """The length of the early phase in steps; dense refreshes are too dear for it."""
        if self.early_steps is None and self.kind == "dense":
            return 0
        return super().resolved_early_steps

    @property
    def resolved_max_rows(self) -> int | None:
        """The most rows of a call that are read; None for all, as dense kinds need."""
        if self.max_rows == "auto" and self.kind == "dense":
            return None
        return super().resolved_max_rows
