"""For makers that are made anew of every batch: settings that would have no meaning there."""

from __future__ import annotations

from distcurv.errors import ConfigError
from distcurv.makers.preconditioning_config import PreconditioningConfig


def check_every_step(config: PreconditioningConfig, who: str) -> None:
    """Raise `ConfigError` for updates at some steps only."""
    times = {
        "preconditioner_upd_interval": 1,
        "preconditioner_upd_ratio": 1.0,
        "curvature_upd_interval": None,
        "curvature_upd_ratio": None,
    }
    for name, value in times.items():
        if getattr(config, name) not in (value, 1):
            raise ConfigError(
                f"PreconditioningConfig.{name} is {getattr(config, name)!r}: {who} works at every "
                "step, leave it out"
            )


def check_no_average(config: PreconditioningConfig, who: str) -> None:
    """Raise `ConfigError` for a running average."""
    if config.ema_decay is not None:
        raise ConfigError(
            f"PreconditioningConfig.ema_decay is {config.ema_decay!r}: {who} takes the newest "
            "batch alone, leave it out"
        )
