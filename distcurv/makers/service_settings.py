"""From `PreconditioningConfig` to the settings of the service, for makers that are served.

Updates are counted exactly: a window of the service ends at the steps that the config names, and
statistics are taken at those that it names.  Without workers and without an ``install_delay`` the
service runs within the step: a version is installed at the step whose statistic it holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distcurv.errors import ConfigError
from distcurv.makers.preconditioning_config import PreconditioningConfig
from distcurv.makers.schedule import UpdateTimes

NEVER = 1 << 40  # steps; what a window lasts after the last update


@dataclass(frozen=True)
class UntilUpdate:
    """Steps from one update to the next: a window's length by its first step."""

    times: UpdateTimes

    def __call__(self, step: int) -> int:
        times = self.times
        if times.schedule is not None:
            later = range(step + 1, len(times.schedule))
            return next((s for s in later if times.schedule[s]), step + NEVER) - step
        if step + 1 < times.warmup_steps:
            return 1
        past = step + 1 - times.warmup_steps
        return times.warmup_steps + -(-past // times.interval) * times.interval - step


@dataclass(frozen=True)
class Due:
    """Whether a step is one of these times."""

    times: UpdateTimes

    def __call__(self, step: int) -> bool:
        return self.times.due(step)


def is_inline(config: PreconditioningConfig) -> bool:
    """Whether refreshes run in the process of their owner, by the config alone."""
    return config.workers in (0, "inline")


def refuse_unused(config: PreconditioningConfig, maker: str, why: str) -> None:
    """Raise `ConfigError` where a config asks for what the maker does not have."""
    unused = (("kl_clip", None), ("graft", False), ("overrides", ()), ("max_itr", None))
    for name, default in unused:
        value = getattr(config, name)
        if value != default:
            raise ConfigError(f"PreconditioningConfig.{name} is {value!r}: {maker} has none; {why}")


def service_settings(config: PreconditioningConfig, early_steps: int | None) -> dict[str, Any]:
    """Keyword arguments for a `ServiceConfig`, all but the rank and the decay.

    Args:
        early_steps: what ``config.early_steps=None`` stands for where refreshes come later than
            the step; 0 where they do not.

    Raises `ConfigError` for times without an update.
    """
    times, statistics = config.preconditioner_times(), config.curvature_times()
    for side, own in (("preconditioner", times), ("curvature", statistics)):
        if not own.due(0):
            raise ConfigError(
                f"PreconditioningConfig.{side}_upd_ratio gives no update in "
                f"{config.num_total_steps} steps: raise it, or use GradientMaker"
            )
    delay = config.install_delay
    if delay is None and is_inline(config):
        delay = 0
    if config.early_steps is not None:
        early_steps = config.early_steps
    elif delay == 0:
        early_steps = 0
    regular = times.schedule is None and times.warmup_steps == 0
    return {
        "preconditioner_upd_interval": times.interval if regular else UntilUpdate(times),
        "statistics_at": Due(statistics),
        "early_steps": early_steps,
        "early_interval": config.early_interval,
        "install_delay": delay,
        "encoding": config.encoding,
        "wire_dtype": config.wire_dtype,
        "max_staleness": config.max_staleness,
        "staleness_policy": config.staleness_policy,
        "max_owners": config.max_owners,
        "link_timeout": config.link_timeout,
        "heartbeat": config.heartbeat,
        "wait_timeout": config.wait_timeout,
        "check_replicas": config.check_replicas,
        "seed": config.seed,
    }
