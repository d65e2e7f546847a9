"""How a convolution's kernel slides over images, and some of the patches that it sees.

Letters: N samples, C channels, H W image, J K kernel, P Q output positions, n drawn rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from distcurv.curvature.row_draw import GridDraw


@dataclass(frozen=True)
class Sliding:
    """Kernel, stride and padding, rows of pixels first.

    Attributes:
        kernel: (J, K).
        stride: between two positions.
        pads: ((top, bottom), (left, right)).
        padding_mode: as in `torch.nn.Conv2d`: ``zeros | reflect | replicate | circular``.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    pads: tuple[tuple[int, int], tuple[int, int]]
    padding_mode: str

    def positions(self, height: int, width: int) -> tuple[int, int]:
        """(P, Q): how many positions there are on an image H × W."""
        (top, bottom), (left, right) = self.pads
        return (
            (height + top + bottom - self.kernel[0]) // self.stride[0] + 1,
            (width + left + right - self.kernel[1]) // self.stride[1] + 1,
        )

    def padded(self, x_NCHW: Tensor) -> Tensor:
        """The image that the kernel really slides over."""
        (top, bottom), (left, right) = self.pads
        if not any((top, bottom, left, right)):
            return x_NCHW
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x_NCHW, (left, right, top, bottom), mode=mode)


def take_patches(x_NCHW: Tensor, sliding: Sliding, draw: GridDraw) -> Tensor:
    """A copy of the drawn patches [n, C J K], in the order of ``weight.flatten(1)``.

    Only drawn images are padded, and only drawn patches are formed."""
    x_nCHW = sliding.padded(x_NCHW[draw.samples.slice])
    windows_nCPQJK = x_nCHW.unfold(2, sliding.kernel[0], sliding.stride[0]).unfold(
        3, sliding.kernel[1], sliding.stride[1]
    )
    some = windows_nCPQJK[:, :, draw.down.slice, draw.across.slice].permute(0, 2, 3, 1, 4, 5)
    return some.clone(memory_format=torch.contiguous_format).flatten(3).flatten(0, 2)


def take_pixels(x_NCPQ: Tensor, draw: GridDraw) -> Tensor:
    """A copy of the drawn pixels [n, C]."""
    some = x_NCPQ[draw.samples.slice, :, draw.down.slice, draw.across.slice].movedim(1, 3)
    return some.clone(memory_format=torch.contiguous_format).flatten(0, 2)
