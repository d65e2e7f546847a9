"""How a convolution's kernel slides over images of any number of axes, and what it sees there.

A patch is what the kernel sees at one position: C numbers for each of its offsets, in the order of
``weight.flatten(1)``.  Products with all patches are convolutions and weight gradients; their
column sums are sums of shifted, strided boxes of the image.  Patches are formed only where they
are asked for.

Letters: N samples, C channels, L the axes of an image, K those of the kernel, P those of the
output (one to three each), n drawn rows, r filters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONVOLUTION_WEIGHTS = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


class Windows(Protocol):
    """Where a kernel looks, see `Sliding` and `distcurv.layers.spreading`."""

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel's sizes along the axes."""
        ...

    def positions(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """P: how many positions there are along each axis of an image of these sizes L."""
        ...

    def padded(self, x_NCL: Tensor) -> Tensor:
        """The image that the other methods look at."""
        ...

    def project(self, x_NCL: Tensor, filters_rCK: Tensor, bias_r: Tensor | None) -> Tensor:
        """[N, r, P]: the patches times filters, plus a bias."""
        ...

    def gather(self, x_NCL: Tensor, projected_NrP: Tensor) -> Tensor:
        """[r, C, K]: the sum over positions and samples of the patches times these numbers."""
        ...

    def box_sums(self, x_NCL: Tensor, positions: tuple[int, ...]) -> Tensor:
        """[N, C, K]: for each kernel offset the sum over the positions of what it sees."""
        ...

    def patches(self, x_NCL: Tensor, positions: tuple[slice, ...]) -> Tensor:
        """A copy of the patches [n, C K] at some positions of every image."""
        ...


@dataclass(frozen=True)
class Sliding:
    """The windows of a convolution.

    Attributes:
        kernel: its sizes along the axes.
        stride: between two positions.
        dilation: between two offsets of the kernel.
        pads: (before, after) of each axis.
        padding_mode: as in `torch.nn.Conv2d`: ``zeros | reflect | replicate | circular``.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    padding_mode: str

    def positions(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """See `Windows.positions`."""
        return tuple(
            (size + sum(pads) - dilation * (kernel - 1) - 1) // stride + 1
            for size, pads, dilation, kernel, stride in zip(
                sizes, self.pads, self.dilation, self.kernel, self.stride, strict=True
            )
        )

    def padded(self, x_NCL: Tensor) -> Tensor:
        """See `Windows.padded`."""
        if not any(before or after for before, after in self.pads):
            return x_NCL
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x_NCL, last_axis_first(self.pads), mode=mode)

    def project(self, x_NCL: Tensor, filters_rCK: Tensor, bias_r: Tensor | None) -> Tensor:
        """See `Windows.project`."""
        convolve = CONVOLUTIONS[len(self.kernel)]
        return convolve(x_NCL, filters_rCK, bias_r, stride=self.stride, dilation=self.dilation)

    def gather(self, x_NCL: Tensor, projected_NrP: Tensor) -> Tensor:
        """See `Windows.gather`."""
        return CONVOLUTION_WEIGHTS[len(self.kernel)](
            x_NCL,
            (projected_NrP.shape[1], x_NCL.shape[1], *self.kernel),
            projected_NrP,
            stride=self.stride,
            dilation=self.dilation,
        )

    def box_sums(self, x_NCL: Tensor, positions: tuple[int, ...]) -> Tensor:
        """See `Windows.box_sums`."""
        seen = [
            [
                slice(k * dilation, k * dilation + stride * (count - 1) + 1, stride)
                for k in range(kernel)
            ]
            for kernel, stride, dilation, count in zip(
                self.kernel, self.stride, self.dilation, positions, strict=True
            )
        ]
        return separable_sums(x_NCL, seen)

    def patches(self, x_NCL: Tensor, positions: tuple[slice, ...]) -> Tensor:
        """See `Windows.patches`."""
        windows = self._windows(x_NCL)[(slice(None), slice(None), *positions)]
        axes = len(self.kernel)
        some = windows.movedim(1, 1 + axes).clone(memory_format=torch.contiguous_format)
        return some.flatten(1 + axes).flatten(0, axes)

    def _windows(self, x_NCL: Tensor) -> Tensor:
        """[N, C, P, K], a view."""
        windows = x_NCL
        for axis, (kernel, stride, dilation) in enumerate(
            zip(self.kernel, self.stride, self.dilation, strict=True)
        ):
            windows = windows.unfold(2 + axis, dilation * (kernel - 1) + 1, stride)
            if dilation > 1:
                windows = windows[..., ::dilation]
        return windows


def last_axis_first(pads: Sequence[tuple[int, int]]) -> list[int]:
    """As `F.pad` wants them."""
    return [size for pair in reversed(pads) for size in pair]


def separable_sums(x_NCL: Tensor, seen: Sequence[Sequence[slice]]) -> Tensor:
    """[N, C, K]: for each kernel offset the sum of the box that it sees.

    The box is separable: the last axis first, so the image is read as often as it has offsets.

    Args:
        seen: for each axis and each offset along it what that offset sees of the axis.
    """
    for axis in reversed(range(len(seen))):
        dim = 2 + axis
        before = (slice(None),) * dim
        x_NCL = torch.stack([x_NCL[(*before, part)].sum(dim) for part in seen[axis]], dim=dim)
    return x_NCL


def take_pixels(x_NCP: Tensor, samples: slice, positions: tuple[slice, ...]) -> Tensor:
    """A copy of some pixels of some images, [n, C]."""
    some = x_NCP[(samples, slice(None), *positions)].movedim(1, -1)
    return some.clone(memory_format=torch.contiguous_format).flatten(0, -2)
