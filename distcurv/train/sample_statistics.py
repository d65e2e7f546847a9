"""The statistic that the per-sample gradients of all calls of one backward make together.

Letters: N samples, n of one chunk, P numbers of the block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distcurv.curvature.precision import full_float32
from distcurv.curvature.sample_gradients import encode_samples
from distcurv.curvature.spec import BlockSpec, Tensors
from distcurv.errors import CaptureError
from distcurv.layers.sample_gradients import NUMBERS_PER_CHUNK
from distcurv.train.sample_uses import Shown


def samples_statistic(spec: BlockSpec, shown: Sequence[Shown], bases: Tensors) -> Tensors:
    """The sums over samples, see `encode_samples`.

    Raises `CaptureError` where the calls are not of the same samples."""
    sizes = {len(one.grad_output) for one in shown}
    if len(sizes) > 1:
        raise CaptureError(
            f"block {spec.name!r} of kind {spec.kind!r} joins calls of {sorted(sizes)} samples: "
            "per-sample gradients need the same samples in dimension 0 of all of them; give the "
            "layer with fewer another kind by KfacConfig.overrides, or leave it out"
        )
    (samples,) = sizes
    first_side, *others = spec.sides
    numbers = first_side.dim * (others[0].dim if others else first_side.units)
    widest = max(numbers, *(one.use.width(one.grad_output) for one in shown))
    chunk = max(1, NUMBERS_PER_CHUNK // widest)
    total: Tensors = {}
    with torch.no_grad(), full_float32(shown[0].grad_output.device):
        for first in range(0, samples, chunk):
            grads_nP = _joined(shown, slice(first, first + chunk), numbers)
            for name, value in encode_samples(spec, grads_nP, bases).items():
                total[name] = total[name] + value if name in total else value
    return total


def _joined(shown: Sequence[Shown], part: slice, numbers: int) -> Tensor:
    grads_nP: Tensor | None = None
    for one in shown:
        own = one.use.gradients(one.kept, one.grad_output, part) * one.factor
        if grads_nP is None:
            grads_nP = own.new_zeros(len(own), numbers)
        grads_nP[:, one.use.start : one.use.start + own.shape[1]] += own
    assert grads_nP is not None
    return grads_nP
