"""Optimizers that are served by the curvature service."""

from distcurv.optim.lowrank_soap import LowRankSOAP

__all__ = ["LowRankSOAP"]
