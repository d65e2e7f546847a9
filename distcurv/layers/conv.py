"""Convolutions as linear maps on patches, without forming the patches (im2col) for a sketch.

With X the patches [N S, d], d = C K (the order of ``weight.flatten(1)``) and Q [d, r] a basis:

* X Q is a convolution with Q's columns as r filters (and Q's last row as their bias, where there
  is a bias coordinate);
* X^T (X Q) is the weight gradient of that convolution for the output gradient X Q;
* the column sums of X, and of its squares, are sums of shifted, strided boxes of the image.

So a sketch needs N S r numbers besides the (padded) input, not N S d.  Where only n rows are
wanted, n patches are read, which costs less than any convolution.

Groups.  A convolution with groups is one block: the matrix [Do, (C / groups) K], whose rows see
the patches of their own group's channels.  The groups share side A, the sum over them of their
patches' outer products, as if they were further positions: its count is N S groups, and each
patch has its own bias coordinate.  Side G is over all Do outputs.  (A Kronecker product cannot say
that outputs of different groups have different inputs; one small A for all is what remains of it.)
Hence the groups of an image are looked at as images of their own, [N groups, C / groups, ...].

Letters: N samples, C channels, L the axes of an image, K those of the kernel, P those of the
output (one to three each), S positions, d r as above.
"""

from __future__ import annotations

import math
from typing import cast

from torch import Tensor, nn

from distcurv.curvature.precision import at_least_float32
from distcurv.curvature.row_draw import Sampler
from distcurv.curvature.spec import SideSpec, Tensors
from distcurv.errors import CaptureError
from distcurv.layers.affine_rows import affine_sketch, encode_affine_rows, require_basis
from distcurv.layers.layer import Rows, WeightSharing
from distcurv.layers.sliding import Sliding, Windows, take_pixels
from distcurv.layers.weight_bias import WeightBias

# Statistics of all positions are made in chunks of images whose patches (dense) or products with
# the basis (sketch) hold about this many numbers.
NUMBERS_PER_CHUNK = 1 << 24

_AXES = {1: ("L",), 2: ("H", "W"), 3: ("D", "H", "W")}  # as torch's documentation calls them


class ConvIO(WeightBias):
    """`LayerIO` of `torch.nn.Conv1d`, `Conv2d` and `Conv3d`: the output pixels are the positions.

    Of a drawn position (`input_rows`) every group has a row."""

    call_kind = "conv"
    family = "Conv"

    def windows(self, module: nn.Module) -> Windows:
        """Where the kernel looks, from the attributes of a module or its stand-in."""
        conv = cast(nn.Conv2d, module)
        if conv.padding == "valid":
            pads = [(0, 0) for _ in conv.kernel_size]
        elif conv.padding == "same":
            # As torch does: what cannot be halved goes behind.
            totals = [
                d * (size - 1) for d, size in zip(conv.dilation, conv.kernel_size, strict=True)
            ]
            pads = [(total // 2, total - total // 2) for total in totals]
        else:
            pads = [(size, size) for size in cast("tuple[int, ...]", conv.padding)]
        return Sliding(conv.kernel_size, conv.stride, conv.dilation, tuple(pads), conv.padding_mode)

    def input_statistic(
        self,
        module: nn.Module,
        input: Tensor,
        side: SideSpec,
        basis_dr: Tensor | None,
        *,
        bias: bool,
        weight_sharing: WeightSharing,
    ) -> Tensors:
        """See `LayerIO.input_statistic`."""
        x_NCL = at_least_float32(_own_images(module, self._images(module, input, "input")))
        windows = self.windows(module)
        positions = windows.positions(x_NCL.shape[2:])
        if weight_sharing == "reduce":
            rows = _means(x_NCL, windows)
            statistic = encode_affine_rows(side, rows, basis_dr, bias)
            statistic["count"] = rows.new_full((), rows.shape[0])
            return statistic
        x_NCL = windows.padded(x_NCL)
        if side.encoding == "sketch":
            basis_dr = require_basis(side, basis_dr, x_NCL)
        wide = side.rank if side.encoding == "sketch" else side.dim
        chunk = max(1, NUMBERS_PER_CHUNK // (wide * math.prod(positions)))
        total: Tensors = {}
        for part_nCL in x_NCL.split(chunk):
            if side.encoding == "sketch":
                assert basis_dr is not None
                some = _sketch(windows, part_nCL, side, basis_dr, bias, positions)
            else:
                rows = windows.patches(part_nCL, (slice(None),) * len(positions))
                some = encode_affine_rows(side, rows, None, bias)
            for name, value in some.items():
                total[name] = total[name] + value if name in total else value
        total["count"] = x_NCL.new_full((), x_NCL.shape[0] * math.prod(positions))
        return total

    def output_statistic(
        self,
        module: nn.Module,
        grad_output: Tensor,
        side: SideSpec,
        basis_dr: Tensor | None,
        *,
        weight_sharing: WeightSharing,
    ) -> Tensors:
        """See `LayerIO.output_statistic`."""
        g_NdP = at_least_float32(self._images(module, grad_output, "output gradient"))
        if weight_sharing == "reduce":
            rows = g_NdP.sum(tuple(range(2, g_NdP.dim())))
        else:
            rows = g_NdP.movedim(1, -1).flatten(0, -2)
        statistic = encode_affine_rows(side, rows, basis_dr, bias=False)
        statistic["count"] = rows.new_full((), g_NdP.shape[0])
        return statistic

    def input_rows(
        self,
        module: nn.Module,
        input: Tensor,
        sampler: Sampler,
        *,
        weight_sharing: WeightSharing,
    ) -> Rows:
        """See `LayerIO.input_rows`."""
        x_NCL, windows = self._images(module, input, "input"), self.windows(module)
        samples, groups = x_NCL.shape[0], cast(nn.Conv2d, module).groups
        if weight_sharing == "reduce":
            draw = sampler.rows(samples)
            some_nCL = at_least_float32(_own_images(module, x_NCL[draw.slice]))
            return Rows(_means(some_nCL, windows), draw.every, samples * groups)
        positions = windows.positions(x_NCL.shape[2:])
        grid = sampler.grid(samples, *positions)
        # Only drawn images are padded, and only drawn patches are formed.
        some_nCL = windows.padded(_own_images(module, x_NCL[grid.samples.slice]))
        rows = windows.patches(some_nCL, grid.slices)
        return Rows(rows, grid.weight, samples * groups * math.prod(positions))

    def output_rows(
        self,
        module: nn.Module,
        grad_output: Tensor,
        sampler: Sampler,
        *,
        weight_sharing: WeightSharing,
    ) -> Rows:
        """See `LayerIO.output_rows`."""
        g_NdP = self._images(module, grad_output, "output gradient")
        samples = g_NdP.shape[0]
        if weight_sharing == "reduce":
            draw = sampler.rows(samples)
            rows = at_least_float32(g_NdP[draw.slice]).sum(tuple(range(2, g_NdP.dim())))
            return Rows(rows, draw.every, samples)
        grid = sampler.grid(samples, *g_NdP.shape[2:])
        return Rows(take_pixels(g_NdP, grid.samples.slice, grid.slices), grid.weight, samples)

    def _images(self, module: nn.Module, tensor: Tensor, what: str) -> Tensor:
        axes = len(cast(nn.Conv2d, module).kernel_size)
        if tensor.dim() != 2 + axes:
            shape = ", ".join(("N", "C", *_AXES[axes]))
            raise CaptureError(
                f"a {self.family}{axes}d layer got an {what} of shape {tuple(tensor.shape)}: "
                "without a batch dimension samples cannot be counted; give it "
                f"[{shape}], e.g. x.unsqueeze(0)"
            )
        return tensor.detach()


def _own_images(module: nn.Module, x_NCL: Tensor) -> Tensor:
    """The images of the groups, [N groups, C / groups, L]."""
    groups = cast(nn.Conv2d, module).groups
    return x_NCL if groups == 1 else x_NCL.unflatten(1, (groups, -1)).flatten(0, 1)


def _means(x_NCL: Tensor, windows: Windows) -> Tensor:
    """[N, C K]: the mean over the output positions of what each kernel offset sees."""
    positions = windows.positions(x_NCL.shape[2:])
    sums_NCK = windows.box_sums(windows.padded(x_NCL), positions)
    return sums_NCK.flatten(1) / math.prod(positions)


def _sketch(
    windows: Windows,
    x_NCL: Tensor,
    side: SideSpec,
    basis_dr: Tensor,
    bias: bool,
    positions: tuple[int, ...],
) -> Tensors:
    weights_dr, bias_r = (basis_dr[:-1], basis_dr[-1]) if bias else (basis_dr, None)
    filters_rCK = weights_dr.T.reshape(side.rank, x_NCL.shape[1], *windows.kernel)
    projected_NrP = windows.project(x_NCL, filters_rCK, bias_r)
    y_rCK = windows.gather(x_NCL, projected_NrP)
    squares_1CL = x_NCL.square().sum(0, keepdim=True)
    diag_d = windows.box_sums(squares_1CL, positions).flatten()
    squares = {"trace": diag_d.sum()}
    if side.tail == "diagonal":
        squares["diag"] = diag_d
    y_bias_r = projected_NrP.sum((0, *range(2, projected_NrP.dim()))) if bias else None
    rows = x_NCL.shape[0] * math.prod(positions)
    return affine_sketch(side, y_rCK.flatten(1).T, y_bias_r, squares, rows)
