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
    from distcurv import makers, optim, wiring
    from distcurv.config import KfacConfig, ServiceConfig, SoapConfig
    from distcurv.layers import Bias, Scale, register_layer
    from distcurv.makers import (
        CurveBallGradientConfig,
        CurveBallGradientMaker,
        DiagNaturalGradientMaker,
        EkfacGradientMaker,
        EmpNaturalGradientMaker,
        FullNaturalGradientMaker,
        GradientMaker,
        KfacGradientMaker,
        KronBfgsGradientMaker,
        KronPsgdGradientMaker,
        LayerWiseNaturalGradientMaker,
        NaturalGradientMaker,
        NewtonGradientConfig,
        NewtonGradientMaker,
        PreconditionedGradientMaker,
        PreconditioningConfig,
        PsgdGradientMaker,
        SengGradientMaker,
        ShampooGradientMaker,
        SmwEmpNaturalGradientConfig,
        SmwEmpNaturalGradientMaker,
        SoapGradientMaker,
        UnitWiseNaturalGradientMaker,
    )
    from distcurv.optim import LowRankSOAP
    from distcurv.train.group import RankGroup
    from distcurv.train.lanes import OwnerLinks
    from distcurv.train.likelihoods import Bernoulli, Categorical, Gaussian
    from distcurv.train.placement import Load
    from distcurv.train.preconditioner import Preconditioner

__version__ = "0.1.0"

__all__ = [
    "Bernoulli",
    "Bias",
    "Categorical",
    "CurveBallGradientConfig",
    "CurveBallGradientMaker",
    "DiagNaturalGradientMaker",
    "EkfacGradientMaker",
    "EmpNaturalGradientMaker",
    "FullNaturalGradientMaker",
    "Gaussian",
    "GradientMaker",
    "KfacConfig",
    "KfacGradientMaker",
    "KronBfgsGradientMaker",
    "KronPsgdGradientMaker",
    "LayerWiseNaturalGradientMaker",
    "LowRankSOAP",
    "NaturalGradientMaker",
    "NewtonGradientConfig",
    "NewtonGradientMaker",
    "PreconditionedGradientMaker",
    "Preconditioner",
    "PreconditioningConfig",
    "PsgdGradientMaker",
    "Scale",
    "SengGradientMaker",
    "ServiceConfig",
    "ShampooGradientMaker",
    "SmwEmpNaturalGradientConfig",
    "SmwEmpNaturalGradientMaker",
    "SoapConfig",
    "SoapGradientMaker",
    "UnitWiseNaturalGradientMaker",
    "makers",
    "optim",
    "register_layer",
    "wiring",
]

_MODULES = ("makers", "optim", "wiring")
_HOMES = {
    "Bernoulli": "distcurv.train.likelihoods",
    "Bias": "distcurv.layers",
    "Categorical": "distcurv.train.likelihoods",
    "CurveBallGradientConfig": "distcurv.makers",
    "CurveBallGradientMaker": "distcurv.makers",
    "DiagNaturalGradientMaker": "distcurv.makers",
    "EkfacGradientMaker": "distcurv.makers",
    "EmpNaturalGradientMaker": "distcurv.makers",
    "FullNaturalGradientMaker": "distcurv.makers",
    "Gaussian": "distcurv.train.likelihoods",
    "GradientMaker": "distcurv.makers",
    "KfacConfig": "distcurv.config",
    "KfacGradientMaker": "distcurv.makers",
    "KronBfgsGradientMaker": "distcurv.makers",
    "KronPsgdGradientMaker": "distcurv.makers",
    "LayerWiseNaturalGradientMaker": "distcurv.makers",
    "LowRankSOAP": "distcurv.optim",
    "NaturalGradientMaker": "distcurv.makers",
    "NewtonGradientConfig": "distcurv.makers",
    "NewtonGradientMaker": "distcurv.makers",
    "PreconditionedGradientMaker": "distcurv.makers",
    "Preconditioner": "distcurv.train.preconditioner",
    "PreconditioningConfig": "distcurv.makers",
    "PsgdGradientMaker": "distcurv.makers",
    "Scale": "distcurv.layers",
    "SengGradientMaker": "distcurv.makers",
    "ServiceConfig": "distcurv.config",
    "ShampooGradientMaker": "distcurv.makers",
    "SmwEmpNaturalGradientConfig": "distcurv.makers",
    "SmwEmpNaturalGradientMaker": "distcurv.makers",
    "SoapConfig": "distcurv.config",
    "SoapGradientMaker": "distcurv.makers",
    "UnitWiseNaturalGradientMaker": "distcurv.makers",
    "register_layer": "distcurv.layers",
}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"distcurv.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'distcurv' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _connect(workers: provider.Workers, group: RankGroup, load: Load) -> OwnerLinks:
    from distcurv.wiring import owner_links

    return owner_links(workers, group, load)


def _events(who: str) -> Callable[..., None]:
    from distcurv.observe.events import from_environment

    return from_environment(who)


provider.register_connector(_connect)
provider.register_events(_events)
