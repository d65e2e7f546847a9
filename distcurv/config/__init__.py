"""Every setting and its default, in frozen dataclasses that are validated once, when made.

`ServiceConfig` holds what every preconditioner shares (rank, intervals, staleness, links);
`SoapConfig` and `KfacConfig` add what belongs to one rule.  A value that cannot work raises
`ConfigError` at once, naming the field, the value and what to do.  Nothing here loads torch.
"""

from __future__ import annotations

from distcurv.config.kfac import BlockConfig, KfacConfig
from distcurv.config.schedule import Schedule
from distcurv.config.service import MAX_DELAY_WINDOWS, Intervals, ServiceConfig
from distcurv.config.soap import SoapConfig

__all__ = [
    "MAX_DELAY_WINDOWS",
    "BlockConfig",
    "Intervals",
    "KfacConfig",
    "Schedule",
    "ServiceConfig",
    "SoapConfig",
]
