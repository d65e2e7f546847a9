"""The kind ``unitwise``: a 2 x 2 matrix for the weight and the bias of each unit.

For normalisation layers: their weight and bias act on one channel each. The matrix of unit i is the
mean of [gw_i, gb_i] [gw_i, gb_i]ᵀ over the samples, g being per-sample gradients. The block's
gradient is a column [d, 1] with a bias [d]; without a bias ``wb`` and ``bb`` are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distcurv.curvature.estimate import ROUNDING
from distcurv.curvature.kinds.average import require_not_negative
from distcurv.curvature.kinds.averaged import Averaged
from distcurv.curvature.one_sided import UnitInverse, invert_units
from distcurv.curvature.spec import ONE_SIDE, BlockSpec, Tensors
from distcurv.errors import NumericsError


class Unitwise(Averaged):
    """See `distcurv.curvature.kinds.kind.Kind`.  Needs one side of encoding ``unit``."""

    name = "unitwise"
    encoding = "unit"
    entries = ("ww", "wb", "bb")
    squares = ("ww", "bb")

    def check(self, statistic: Tensors) -> None:
        ww_Bd, wb_Bd, bb_Bd = (statistic[f"{ONE_SIDE}.{entry}"] for entry in self.entries)
        require_not_negative(torch.cat([ww_Bd, bb_Bd], -1), "a unit's diagonal")
        # Cauchy and Schwarz, but for the rounding of sums over many samples, steps and ranks.
        most_Bd = (ww_Bd.double() * bb_Bd).sqrt() + ROUNDING * (ww_Bd.double() + bb_Bd)
        if bool((wb_Bd.abs() > most_Bd).any()):
            raise NumericsError(
                "a unit's product of weight and bias gradients is larger than their squares allow: "
                "the statistic is not one sum over the same samples"
            )

    def inverses(
        self, spec: BlockSpec, published: Tensors, damping: float | Tensor, relative: bool
    ) -> tuple[UnitInverse]:
        own = self.damping_of(spec, published, damping, relative)
        ww, wb, bb = (published[f"{ONE_SIDE}.{entry}"] for entry in self.entries)
        inverse = invert_units(ww, wb, bb, own)
        seen = published[f"{ONE_SIDE}.weight"].unsqueeze(-1) > 0
        identity = (1.0, 0.0, 1.0)
        return (
            UnitInverse(*(torch.where(seen, e, i) for e, i in zip(inverse, identity, strict=True))),
        )
