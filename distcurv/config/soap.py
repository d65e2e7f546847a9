"""`SoapConfig`: the settings of `distcurv.optim.LowRankSOAP` beyond its param-group options."""

from __future__ import annotations

from dataclasses import dataclass

from distcurv.config.checks import is_count, require
from distcurv.config.schedule import IntervalSchedule
from distcurv.config.service import ServiceConfig


@dataclass(frozen=True, kw_only=True)
class SoapConfig(ServiceConfig):
    """Settings of `distcurv.optim.LowRankSOAP` beyond its param-group options.

    Attributes:
        source: where statistics come from: ``gradient`` | ``activations``.
        accumulation: micro-batches per step; the loss is divided by it.  For ``activations``.
    """

    rank: int = 64
    preconditioner_upd_interval: int | IntervalSchedule = 5
    source: str = "gradient"
    accumulation: int = 1
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
        require(is_count(self.accumulation), self, "accumulation", "give an integer >= 1")
