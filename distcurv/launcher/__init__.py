"""Starts, watches and ends processes: curvature workers and the training job beside them."""

from __future__ import annotations

from distcurv.launcher.job import Job, run_torchrun
from distcurv.launcher.supervisor import Supervisor

__all__ = ["Job", "Supervisor", "run_torchrun"]
