"""distcurv: curvature for PyTorch training, computed elsewhere and installed without waiting.

Public names are imported when they are first used: the launcher and ``--help`` need no torch, and
a process that loaded torch takes seconds to start and to end.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from distcurv.train import provider

if TYPE_CHECKING:
    from distcurv import optim, wiring
    from distcurv.config import KfacConfig, ServiceConfig, SoapConfig
    from distcurv.optim import LowRankSOAP
    from distcurv.train.group import RankGroup
    from distcurv.train.lanes import OwnerLinks
    from distcurv.train.placement import Load
    from distcurv.train.preconditioner import Preconditioner

__version__ = "0.1.0"

__all__ = [
    "KfacConfig",
    "LowRankSOAP",
    "Preconditioner",
    "ServiceConfig",
    "SoapConfig",
    "optim",
    "wiring",
]

_HOMES = {
    "KfacConfig": "distcurv.config",
    "LowRankSOAP": "distcurv.optim",
    "Preconditioner": "distcurv.train.preconditioner",
    "ServiceConfig": "distcurv.config",
    "SoapConfig": "distcurv.config",
}


def __getattr__(name: str) -> object:
    if name in ("optim", "wiring"):
        return importlib.import_module(f"distcurv.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'distcurv' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def _connect(workers: provider.Workers, group: RankGroup, load: Load) -> OwnerLinks:
    from distcurv.wiring import owner_links

    return owner_links(workers, group, load)


def _events(who: str) -> Callable[..., None]:
    from distcurv.observe.events import from_environment

    return from_environment(who)


provider.register_connector(_connect)
provider.register_events(_events)
