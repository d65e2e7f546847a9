"""The kind ``diagonal``: one number per parameter, the mean square of its per-sample gradients.

For parameters that no layer's Kronecker product covers: biases and scales on their own, parameters
that plain arithmetic uses. The block's gradient is a column [d, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from distcurv.curvature.inverse import Inverse, invert_diagonal
from distcurv.curvature.kinds.average import require_not_negative
from distcurv.curvature.kinds.averaged import Averaged
from distcurv.curvature.spec import ONE_SIDE, BlockSpec, Tensors


class Diagonal(Averaged):
    """See `distcurv.curvature.kinds.kind.Kind`.  Needs one side of encoding ``diagonal``."""

    name = "diagonal"
    encoding = "diagonal"
    entries = ("diag",)
    squares = ("diag",)

    def check(self, statistic: Tensors) -> None:
        require_not_negative(statistic[f"{ONE_SIDE}.diag"], "the diagonal of a block")

    def inverses(
        self, spec: BlockSpec, published: Tensors, damping: float | Tensor, relative: bool
    ) -> tuple[Inverse]:
        own = self.damping_of(spec, published, damping, relative)
        inverse = invert_diagonal(published[f"{ONE_SIDE}.diag"], own)
        seen = published[f"{ONE_SIDE}.weight"].unsqueeze(-1) > 0
        return (inverse._replace(inv_diag=torch.where(seen, inverse.inv_diag, 1.0)),)
