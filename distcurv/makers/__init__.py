"""The unified interface: one GradientMaker per algorithm, with ASDL's names and conventions."""

from distcurv.makers.curve_ball import CurveBallGradientConfig, CurveBallGradientMaker
from distcurv.makers.dummy_object import DummyObject
from distcurv.makers.fisher_arguments import FISHER_EMP, FISHER_EXACT, FISHER_MC
from distcurv.makers.grad_maker import LOSS_CROSS_ENTROPY, LOSS_MSE, GradientMaker
from distcurv.makers.kfac import KfacGradientMaker
from distcurv.makers.kron_bfgs import KronBfgsGradientMaker
from distcurv.makers.kron_psgd import KronPsgdGradientMaker
from distcurv.makers.natural_gradient import NaturalGradientMaker
from distcurv.makers.natural_shapes import (
    DiagNaturalGradientMaker,
    EkfacGradientMaker,
    EmpNaturalGradientMaker,
    FullNaturalGradientMaker,
    LayerWiseNaturalGradientMaker,
    UnitWiseNaturalGradientMaker,
)
from distcurv.makers.newton import NewtonGradientConfig, NewtonGradientMaker
from distcurv.makers.preconditioned import PreconditionedGradientMaker
from distcurv.makers.preconditioning_config import PreconditioningConfig
from distcurv.makers.psgd import PsgdGradientMaker
from distcurv.makers.schedule import (
    INTERVAL_CONSTANT,
    INTERVAL_LINEAR,
    INTERVAL_STEP,
    INTERVAL_TYPES,
    get_update_schedule,
)
from distcurv.makers.seng import SengGradientMaker
from distcurv.makers.shampoo import ShampooGradientMaker
from distcurv.makers.shapes import (
    SHAPE_DIAG,
    SHAPE_FULL,
    SHAPE_KFE,
    SHAPE_KRON,
    SHAPE_KRON_DENSE,
    SHAPE_KRON_EIGEN,
    SHAPE_LAYER_WISE,
    SHAPE_SWIFT_KRON,
    SHAPE_UNIT_WISE,
)
from distcurv.makers.smw import SmwEmpNaturalGradientConfig, SmwEmpNaturalGradientMaker
from distcurv.makers.soap import SoapGradientMaker

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
    "CurveBallGradientConfig",
    "CurveBallGradientMaker",
    "DiagNaturalGradientMaker",
    "DummyObject",
    "EkfacGradientMaker",
    "EmpNaturalGradientMaker",
    "FullNaturalGradientMaker",
    "GradientMaker",
    "KfacGradientMaker",
    "KronBfgsGradientMaker",
    "KronPsgdGradientMaker",
    "LayerWiseNaturalGradientMaker",
    "NaturalGradientMaker",
    "NewtonGradientConfig",
    "NewtonGradientMaker",
    "PreconditionedGradientMaker",
    "PreconditioningConfig",
    "PsgdGradientMaker",
    "SengGradientMaker",
    "ShampooGradientMaker",
    "SmwEmpNaturalGradientConfig",
    "SmwEmpNaturalGradientMaker",
    "SoapGradientMaker",
    "UnitWiseNaturalGradientMaker",
    "get_update_schedule",
]
