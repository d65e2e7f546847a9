"""PreconditioningConfig: ASDL's settings, and what the service adds to them.

When there are updates is said in one of two ways, never in both: by interval, or, where
``num_total_steps`` is given, by ratio.  ASDL lets the ratio win with a warning, and its default, 1,
turns an interval of 10 into updates at every step; here it is an error that names both fields.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distcurv.config import KfacConfig
from distcurv.config.overrides import Chooser
from distcurv.errors import ConfigError
from distcurv.makers.schedule import (
    INTERVAL_CONSTANT,
    INTERVAL_TYPES,
    UpdateTimes,
    get_update_schedule,
)
from distcurv.train.provider import Workers

_UNSET = -1  # what ASDL writes for "not set"
_MAY_BE_UNSET = (
    "num_total_steps",
    "curvature_upd_interval",
    "curvature_upd_ratio",
    "data_size",
    "ema_decay",
    "rank",
    "max_staleness",
    "install_delay",
    "max_rows",
    "early_steps",
    "max_itr",
)
# Those of the service, which `KfacConfig` checks.
_SERVICE = (
    "max_staleness",
    "staleness_policy",
    "install_delay",
    "early_steps",
    "early_interval",
    "damping_form",
    "tail_in",
    "tail_out",
    "max_itr",
    "tolerance",
    "encoding",
    "wire_dtype",
    "weight_sharing",
    "max_rows",
    "accumulation",
    "kl_clip",
    "lr",
    "graft",
    "overrides",
    "max_owners",
    "link_timeout",
    "heartbeat",
    "wait_timeout",
    "check_replicas",
    "seed",
)


@dataclass(frozen=True, kw_only=True)
class PreconditioningConfig:
    """When and how gradients are preconditioned.

    ``-1`` counts as not set where the default is None, as in ASDL.

    Attributes:
        num_total_steps: steps of the training: ratios are shares of it.  With it, updates of the
            preconditioner go by ratio; ``preconditioner_upd_interval`` and ``..._warmup_steps``
            must be left alone.
        preconditioner_upd_interval: steps between two updates of the preconditioner.
        preconditioner_warmup_steps: an update at each of the first so many steps.
        preconditioner_upd_ratio: share of all steps that have an update.
        preconditioner_warmup_ratio: share of all steps that are warm-up.
        preconditioner_interval_type: ``constant | step | linear``, see `get_update_schedule`.
        curvature_upd_interval, curvature_upd_ratio, ...: the same for taking statistics, by
            interval or (with ``num_total_steps``) by ratio; neither set: with every update of the
            preconditioner.
        data_size: by what curvature sums are divided; not set: the samples that were seen.  With
            several ranks, those of one rank.
        damping: lambda > 0.
        ema_decay: weight of a *new* statistic in the running average, 0 < it <= 1; not set: the
            newest statistic alone, nothing is accumulated.
        ignore_modules: instances, classes or name substrings that are left alone.
        workers: ``0``/``"inline"``, ``"auto"`` or endpoints, for makers that are served.
        rank: low rank r of both sides; not set: full factors.
        max_itr, tolerance: of the power iteration that finds them, see `distcurv.KfacConfig`.
        max_staleness, install_delay, link_timeout, ...: as in `distcurv.KfacConfig`, for makers
            that are served.

    Raises `ConfigError` with the name of a field that has a value that cannot work.
    """

    num_total_steps: int | None = None
    preconditioner_upd_interval: int = 1
    preconditioner_warmup_steps: int = 0
    preconditioner_upd_ratio: float = 1.0
    preconditioner_warmup_ratio: float = 0.0
    preconditioner_interval_type: str = INTERVAL_CONSTANT
    curvature_upd_interval: int | None = None
    curvature_warmup_steps: int = 0
    curvature_upd_ratio: float | None = None
    curvature_warmup_ratio: float = 0.0
    curvature_interval_type: str = INTERVAL_CONSTANT
    data_size: int | None = None
    damping: float = 1e-7
    ema_decay: float | None = None
    ignore_modules: Sequence[object] | None = None
    workers: Workers = 0
    rank: int | None = None
    max_staleness: int | None = None
    staleness_policy: str = "keep"
    install_delay: int | None = None
    early_steps: int | None = None
    early_interval: int = 2
    damping_form: str = "absolute"
    tail_in: str = "isotropic"
    tail_out: str = "diagonal"
    max_itr: int | None = None
    tolerance: float = 0.0
    encoding: str = "auto"
    wire_dtype: str = "float32"
    weight_sharing: str = "expand"
    max_rows: int | str | None = None
    accumulation: int = 1
    kl_clip: float | None = None
    lr: float | None = None
    graft: bool = False
    overrides: Sequence[tuple[Chooser, Mapping[str, object]]] = ()
    max_owners: int = 8
    link_timeout: float = 5.0
    heartbeat: float = 1.0
    wait_timeout: float = 120.0
    check_replicas: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in _MAY_BE_UNSET:
            value = getattr(self, name)
            if _number(value) and value == _UNSET:
                object.__setattr__(self, name, None)
        self._check_times()
        for name in ("data_size", "rank"):
            value = getattr(self, name)
            self._require(name, value is None or _whole(value, 1), "give an integer >= 1, or None")
        free = self.max_itr is None or self.rank is not None
        self._require("max_itr", free, "it is of factors of low rank: give rank with it")
        self._require("damping", _number(self.damping) and self.damping > 0, "give a number > 0")
        ema = self.ema_decay
        self._require(
            "ema_decay",
            ema is None or (_number(ema) and 0 < ema <= 1),
            "give the weight of a new statistic, above 0 and up to 1, or None for no average",
        )
        if isinstance(self.ignore_modules, str):
            self._require("ignore_modules", False, "give a list")
        try:
            KfacConfig(**{name: getattr(self, name) for name in _SERVICE})
        except ConfigError as error:
            raise ConfigError(f"PreconditioningConfig, as {error}") from error

    def _check_times(self) -> None:
        """Each of the fields, and that none is given that would have no effect."""
        total = self.num_total_steps
        self._require("num_total_steps", total is None or _whole(total, 1), "give an integer >= 1")
        every = self.curvature_upd_interval
        self._require(
            "curvature_upd_interval", every is None or _whole(every, 1), "give an integer >= 1"
        )
        name = "preconditioner_upd_interval"
        self._require(name, _whole(self.preconditioner_upd_interval, 1), "give an integer >= 1")
        for side in ("preconditioner", "curvature"):
            steps, kind = f"{side}_warmup_steps", f"{side}_interval_type"
            self._require(steps, _whole(getattr(self, steps), 0), "give an integer >= 0")
            self._require(
                kind, getattr(self, kind) in INTERVAL_TYPES, f"use {', '.join(INTERVAL_TYPES)}"
            )
            for name in (f"{side}_upd_ratio", f"{side}_warmup_ratio"):
                value = getattr(self, name)
                fits = (value is None and name == "curvature_upd_ratio") or (
                    _number(value) and 0 <= value <= 1
                )
                self._require(name, fits, "give a number from 0 to 1")
        by_ratio = "updates go by ratio where num_total_steps is given: leave one of the two out"
        without = "it is a share of num_total_steps: give num_total_steps with it"
        if total is None:
            self._unused(without, preconditioner_upd_ratio=1.0, preconditioner_warmup_ratio=0.0)
            self._unused(without, preconditioner_interval_type=INTERVAL_CONSTANT)
            self._unused(without, curvature_upd_ratio=None)
        else:
            self._unused(by_ratio, preconditioner_upd_interval=1, preconditioner_warmup_steps=0)
        if self.curvature_upd_ratio is None:
            alone = "it goes with curvature_upd_ratio: give both"
            self._unused(alone, curvature_warmup_ratio=0.0, curvature_interval_type="constant")
        elif every is not None:
            want = "curvature_upd_ratio is given as well: leave one of the two out"
            self._unused(want, curvature_upd_interval=None)
        if every is None:
            alone = "it goes with curvature_upd_interval: give both"
            self._unused(alone, curvature_warmup_steps=0)
        self.preconditioner_times()
        self.curvature_times()

    def preconditioner_times(self) -> UpdateTimes:
        """When the preconditioner is updated: with ``num_total_steps`` by ratio, else by
        interval."""
        schedule = None
        if self.num_total_steps is not None:
            schedule = get_update_schedule(
                self.num_total_steps,
                self.preconditioner_upd_ratio,
                self.preconditioner_warmup_ratio,
                self.preconditioner_interval_type,
            )
        return UpdateTimes(
            schedule, self.preconditioner_upd_interval, self.preconditioner_warmup_steps
        )

    def curvature_times(self) -> UpdateTimes:
        """When statistics are taken."""
        if self.curvature_upd_ratio is not None and self.num_total_steps is not None:
            schedule = get_update_schedule(
                self.num_total_steps,
                self.curvature_upd_ratio,
                self.curvature_warmup_ratio,
                self.curvature_interval_type,
            )
            return UpdateTimes(schedule, 1, 0)
        if self.curvature_upd_interval is not None:
            return UpdateTimes(None, self.curvature_upd_interval, self.curvature_warmup_steps)
        return self.preconditioner_times()

    def _unused(self, want: str, **defaults: object) -> None:
        """Refuse values other than these."""
        for name, default in defaults.items():
            self._require(name, getattr(self, name) == default, want)

    def _require(self, name: str, fits: bool, want: str) -> None:
        if not fits:
            raise ConfigError(f"{type(self).__name__}.{name} is {getattr(self, name)!r}: {want}")


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
