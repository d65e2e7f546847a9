"""distcurv: curvature for PyTorch training, computed elsewhere and installed without waiting."""

from distcurv import optim, wiring
from distcurv.config import KfacConfig, ServiceConfig, SoapConfig
from distcurv.optim import LowRankSOAP
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
