"""Which dimensions of a layer's output are units and which are positions.

A parameter that acts unit by unit is broadcast over the positions, so its per-sample gradient is a
sum over them.

Letters: N samples, U units.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from distcurv.errors import CaptureError

# (module or what stands in for it, its input or its output gradient) -> the positions' dimensions.
Positions = Callable[[object, Tensor], range]

_INSTANCE_NORMS = {nn.InstanceNorm1d: 1, nn.InstanceNorm2d: 2, nn.InstanceNorm3d: 3}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm)


def trailing(module: object, tensor: Tensor) -> range:
    """Units are the last dimensions: those of ``normalized_shape`` where the module has one, else
    the last one.  Raises `CaptureError` where no dimension is left for the samples."""
    units = len(getattr(module, "normalized_shape", (0,)))
    if tensor.dim() <= units:
        raise CaptureError(_no_batch(module, tensor, "[N, ..., features]"))
    return range(1, tensor.dim() - units)


def channels(module: object, tensor: Tensor) -> range:
    """Units are dimension 1, of tensors [N, C, ...]."""
    if tensor.dim() < 2:
        raise CaptureError(_no_batch(module, tensor, "[N, C, ...]"))
    return range(2, tensor.dim())


def channels_of_images(spatial: int) -> Positions:
    """The same for modules that also take tensors without a batch dimension, which are told by
    their number of dimensions: with samples 2 + ``spatial``."""

    def positions(module: object, tensor: Tensor) -> range:
        if tensor.dim() != 2 + spatial:
            raise CaptureError(_no_batch(module, tensor, f"[N, C, and {spatial} more]"))
        return range(2, tensor.dim())

    return positions


def positions_of(module: object, tensor: Tensor) -> range:
    """The positions by what the module is: a convolution has a ``kernel_size``, what is unknown is
    taken for a layer of features, like a Linear.  Raises `CaptureError` as the above do."""
    kernel_size = getattr(module, "kernel_size", None)
    if kernel_size is not None:
        return channels_of_images(len(kernel_size))(module, tensor)
    for kind, spatial in _INSTANCE_NORMS.items():
        if isinstance(module, kind):
            return channels_of_images(spatial)(module, tensor)
    return (channels if isinstance(module, _BATCH_NORMS) else trailing)(module, tensor)


def count_positions(tensor: Tensor, positions: range) -> int:
    """How many positions a sample has."""
    return math.prod(tensor.shape[dim] for dim in positions)


def sum_positions(tensor: Tensor, positions: range) -> Tensor:
    """[N, U] from [N, ...]."""
    # A sum over no dimensions would be one over all of them.
    summed = tensor.sum(tuple(positions)) if len(positions) else tensor
    return summed.flatten(1)


def _no_batch(module: object, tensor: Tensor, wanted: str) -> str:
    return (
        f"a {type(module).__name__} layer got a tensor of shape {tuple(tensor.shape)}: without a "
        f"batch dimension samples cannot be counted; give it {wanted}, e.g. x.unsqueeze(0)"
    )
