"""What a transposed convolution's kernel sees: a convolution's windows on zero-stuffed images.

A transposed convolution is the convolution with stride 1 and the mirrored kernel of an image that
has stride - 1 zeros between its pixels and a border of dilation (kernel - 1) - padding zeros.  A
patch has one number for each offset of the weight, unmirrored.  The zeros are never formed but for
single patches: products with all patches are the transposed convolution itself and the weight
gradient of the convolution that it transposes, and an offset sees a range of the pixels.

Letters: N samples, C channels, L the axes of an image, K those of the kernel, P those of the
output (one to three each), n drawn rows, r filters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from distcurv.layers.sliding import (
    CONVOLUTION_WEIGHTS,
    Sliding,
    last_axis_first,
    separable_sums,
)

_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True)
class Spreading:
    """The `Windows` of a transposed convolution; the attributes are as in
    `torch.nn.ConvTranspose2d`."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]

    def positions(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """See `Windows.positions`."""
        axes = zip(sizes, self.stride, self.smallest, strict=True)
        return tuple((size - 1) * stride + smallest for size, stride, smallest in axes)

    @property
    def smallest(self) -> tuple[int, ...]:
        """The positions of an image of one pixel; each further one gives ``stride`` more."""
        axes = zip(self.kernel, self.dilation, self.padding, self.output_padding, strict=True)
        return tuple(
            dilation * (kernel - 1) + 1 - 2 * padding + more
            for kernel, dilation, padding, more in axes
        )

    def padded(self, x_NCL: Tensor) -> Tensor:
        """See `Windows.padded`: nothing to be done."""
        return x_NCL

    def project(self, x_NCL: Tensor, filters_rCK: Tensor, bias_r: Tensor | None) -> Tensor:
        """See `Windows.project`."""
        return _TRANSPOSED[len(self.kernel)](
            x_NCL,
            filters_rCK.transpose(0, 1),
            bias_r,
            stride=self.stride,
            padding=self.padding,
            output_padding=self.output_padding,
            dilation=self.dilation,
        )

    def gather(self, x_NCL: Tensor, projected_NrP: Tensor) -> Tensor:
        """See `Windows.gather`."""
        # The transposed convolution's outputs are inputs of the convolution.  With an output
        # padding of a stride or more that has positions beyond the image.
        axes = zip(self.output_padding, self.stride, strict=True)
        beyond = [(0, more // stride) for more, stride in axes]
        if any(after for _, after in beyond):
            x_NCL = F.pad(x_NCL, last_axis_first(beyond))
        gathered_CrK = CONVOLUTION_WEIGHTS[len(self.kernel)](
            projected_NrP,
            (x_NCL.shape[1], projected_NrP.shape[1], *self.kernel),
            x_NCL,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
        )
        return gathered_CrK.transpose(0, 1)

    def box_sums(self, x_NCL: Tensor, positions: tuple[int, ...]) -> Tensor:
        """See `Windows.box_sums`."""
        axes = zip(
            x_NCL.shape[2:],
            self.kernel,
            self.stride,
            self.dilation,
            self.padding,
            positions,
            strict=True,
        )
        return separable_sums(
            x_NCL,
            [
                [_reaching(size, stride, k * dilation - padding, count) for k in range(kernel)]
                for size, kernel, stride, dilation, padding, count in axes
            ],
        )

    def patches(self, x_NCL: Tensor, positions: tuple[slice, ...]) -> Tensor:
        """See `Windows.patches`."""
        axes = len(self.kernel)
        between = [(size - 1) * s + 1 for size, s in zip(x_NCL.shape[2:], self.stride, strict=True)]
        stuffed_NCL = x_NCL.new_zeros(*x_NCL.shape[:2], *between)
        pixels = [slice(None, None, stride) for stride in self.stride]
        stuffed_NCL[(slice(None), slice(None), *pixels)] = x_NCL
        border = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
        pads = tuple(
            (size - padding, size - padding + more)
            for size, padding, more in zip(border, self.padding, self.output_padding, strict=True)
        )
        sliding = Sliding(self.kernel, (1,) * axes, self.dilation, pads, "zeros")
        mirrored = sliding.patches(sliding.padded(stuffed_NCL), positions)
        dims = tuple(range(2, 2 + axes))
        return mirrored.unflatten(1, (x_NCL.shape[1], *self.kernel)).flip(dims).flatten(1)


def _reaching(size: int, stride: int, shift: int, count: int) -> slice:
    """The pixels i < size that one kernel offset spreads to a position, 0 <= i stride + shift <
    count."""
    first = max(0, -(shift // stride))
    stop = min(size, (count - 1 - shift) // stride + 1)
    return slice(first, max(first, stop))
