"""The registry of kinds: how a block's statistics become a preconditioner.

A new kind is one file in this folder and one line in `KINDS`.
"""

from __future__ import annotations

from distcurv.curvature.kinds.dense import Dense
from distcurv.curvature.kinds.kind import Kind, Refreshed
from distcurv.curvature.kinds.lowrank import LowRank
from distcurv.curvature.spec import SIDE_NAMES

__all__ = ["KINDS", "SIDE_NAMES", "Kind", "Refreshed"]

KINDS: dict[str, Kind] = {kind.name: kind for kind in (LowRank(), Dense())}
