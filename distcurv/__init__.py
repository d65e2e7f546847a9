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
        FISHER_EMP,
        FISHER_EXACT,
        FISHER_MC,
        INTERVAL_CONSTANT,
        INTERVAL_LINEAR,
        INTERVAL_STEP,
        INTERVAL_TYPES,
        LOSS_CROSS_ENTROPY,
        LOSS_MSE,
        SHAPE_DIAG,
        SHAPE_FULL,
        SHAPE_KFE,
        SHAPE_KRON,
        SHAPE_KRON_DENSE,
        SHAPE_KRON_EIGEN,
        SHAPE_LAYER_WISE,
        SHAPE_SWIFT_KRON,
        SHAPE_UNIT_WISE,
        CurveBallGradientConfig,
        CurveBallGradientMaker,
        DiagNaturalGradientMaker,
        DummyObject,
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
        get_update_schedule,
    )
    from distcurv.optim import LowRankSOAP
    from distcurv.train.group import RankGroup
    from distcurv.train.lanes import OwnerLinks
    from distcurv.train.likelihoods import Bernoulli, Categorical, Gaussian
    from distcurv.train.placement import Load
    from distcurv.train.preconditioner import Preconditioner

__version__ = "0.1.0"

__all__ = [
    "FISHER_EMP",
    "FISHER_EXACT",
    "FISHER_MC",
    "INTERVAL_CONSTANT",
    "INTERVAL_LINEAR",
    "INTERVAL_STEP",
    "INTERVAL_TYPES",
    "LOSS_CROSS_ENTROPY",
    "LOSS_MSE",
    "SHAPE_DIAG",
    "SHAPE_FULL",
    "SHAPE_KFE",
    "SHAPE_KRON",
    "SHAPE_KRON_DENSE",
    "SHAPE_KRON_EIGEN",
    "SHAPE_LAYER_WISE",
    "SHAPE_SWIFT_KRON",
    "SHAPE_UNIT_WISE",
    "Bernoulli",
    "Bias",
    "Categorical",
    "CurveBallGradientConfig",
    "CurveBallGradientMaker",
    "DiagNaturalGradientMaker",
    "DummyObject",
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
    "get_update_schedule",
    "makers",
    "optim",
    "register_layer",
    "wiring",
]

_MODULES = ("makers", "optim", "wiring")
_HOMES = {
    "FISHER_EMP": "distcurv.makers",
    "FISHER_EXACT": "distcurv.makers",
    "FISHER_MC": "distcurv.makers",
    "INTERVAL_CONSTANT": "distcurv.makers",
    "INTERVAL_LINEAR": "distcurv.makers",
    "INTERVAL_STEP": "distcurv.makers",
    "INTERVAL_TYPES": "distcurv.makers",
    "LOSS_CROSS_ENTROPY": "distcurv.makers",
    "LOSS_MSE": "distcurv.makers",
    "SHAPE_DIAG": "distcurv.makers",
    "SHAPE_FULL": "distcurv.makers",
    "SHAPE_KFE": "distcurv.makers",
    "SHAPE_KRON": "distcurv.makers",
    "SHAPE_KRON_DENSE": "distcurv.makers",
    "SHAPE_KRON_EIGEN": "distcurv.makers",
    "SHAPE_LAYER_WISE": "distcurv.makers",
    "SHAPE_SWIFT_KRON": "distcurv.makers",
    "SHAPE_UNIT_WISE": "distcurv.makers",
    "Bernoulli": "distcurv.train.likelihoods",
    "Bias": "distcurv.layers",
    "Categorical": "distcurv.train.likelihoods",
    "CurveBallGradientConfig": "distcurv.makers",
    "CurveBallGradientMaker": "distcurv.makers",
    "DiagNaturalGradientMaker": "distcurv.makers",
    "DummyObject": "distcurv.makers",
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
    "get_update_schedule": "distcurv.makers",
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
