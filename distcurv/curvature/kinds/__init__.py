"""The registry of kinds: how a block's statistics become a preconditioner.

A new kind is one file in this folder and one line in `KINDS`.
"""

from __future__ import annotations

from distcurv.curvature.kinds.dense import Dense
from distcurv.curvature.kinds.diagonal import Diagonal
from distcurv.curvature.kinds.fisher import FisherMatrices
from distcurv.curvature.kinds.kfe import Kfe
from distcurv.curvature.kinds.kind import Kind, Refreshed
from distcurv.curvature.kinds.lowrank import LowRank
from distcurv.curvature.kinds.shampoo import Shampoo
from distcurv.curvature.kinds.unitwise import Unitwise
from distcurv.curvature.spec import ONE_SIDE, SIDE_NAMES

__all__ = ["KINDS", "ONE_SIDE", "SIDE_NAMES", "Kind", "Refreshed"]

_ALL: tuple[Kind, ...] = (
    LowRank(),
    Dense(),
    Diagonal(),
    Unitwise(),
    Shampoo(),
    Kfe(),
    FisherMatrices("layer_wise"),
    FisherMatrices("unit_rows", several=True),
    FisherMatrices("full"),
)
KINDS: dict[str, Kind] = {kind.name: kind for kind in _ALL}
