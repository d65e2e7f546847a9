"""nn.Conv2d as a linear map on patches, without forming the patches (im2col) for a sketch.

With X the patches [N S, d], d = C kh kw (the order of ``weight.flatten(1)``) and Q [d, r] a basis:

* X Q is a convolution with Q's columns as r filters (and Q's last row as their bias, where there
  is a bias coordinate);
* X^T (X Q) is the weight gradient of that convolution for the output gradient X Q;
* the column sums of X, and of its squares, are sums of shifted, strided boxes of the image.

So a sketch needs N S r numbers besides the (padded) input, not N S d.  Where only n rows are
wanted, n patches are read (`take_patches`), which costs less than any convolution.

Letters: N samples, C channels, H W image, J K kernel, P Q output positions, S = P Q, d r as above.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from distcurv.curvature.precision import at_least_float32
from distcurv.curvature.row_draw import Sampler
from distcurv.curvature.spec import SideSpec, Tensors
from distcurv.errors import CaptureError
from distcurv.layers.affine_rows import (
    affine_sketch,
    encode_affine_rows,
    require_basis,
)
from distcurv.layers.layer import Rows, WeightSharing
from distcurv.layers.sliding import Sliding, take_patches, take_pixels
from distcurv.layers.weight_bias import WeightBias

# Dense statistics are encoded in chunks of samples whose patches hold about this many numbers.
PATCH_NUMBERS_PER_CHUNK = 1 << 24


class Conv2dIO(WeightBias):
    """`LayerIO` of `torch.nn.Conv2d`: the output pixels are the positions."""

    def refuse(self, module: nn.Module) -> str | None:
        """See `LayerIO.refuse`."""
        conv = cast(nn.Conv2d, module)
        if conv.groups != 1:
            return f"groups={conv.groups} comes in a later version"
        if conv.dilation != (1, 1):
            return f"dilation={conv.dilation} comes in a later version"
        return super().refuse(module)

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
        conv, x_NCHW = cast(nn.Conv2d, module), at_least_float32(_images(input, "input"))
        sliding = _sliding(conv)
        if weight_sharing == "reduce":
            rows = _means(x_NCHW, sliding)
            statistic = encode_affine_rows(side, rows, basis_dr, bias)
            statistic["count"] = rows.new_full((), rows.shape[0])
            return statistic
        positions = math.prod(sliding.positions(*x_NCHW.shape[2:]))
        x_NCHW = sliding.padded(x_NCHW)
        if side.encoding == "sketch":
            statistic = _sketch(sliding, x_NCHW, side, basis_dr, bias)
        else:
            statistic = _dense(sliding, x_NCHW, side, bias, positions)
        statistic["count"] = x_NCHW.new_full((), x_NCHW.shape[0] * positions)
        return statistic

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
        g_NdPQ = at_least_float32(_images(grad_output, "output gradient"))
        if weight_sharing == "reduce":
            rows = g_NdPQ.sum((2, 3))
        else:
            rows = g_NdPQ.movedim(1, 3).flatten(0, 2)
        statistic = encode_affine_rows(side, rows, basis_dr, bias=False)
        statistic["count"] = rows.new_full((), g_NdPQ.shape[0])
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
        x_NCHW, sliding = _images(input, "input"), _sliding(cast(nn.Conv2d, module))
        samples = x_NCHW.shape[0]
        if weight_sharing == "reduce":
            draw = sampler.rows(samples)
            rows = _means(at_least_float32(x_NCHW[draw.slice]), sliding)
            return Rows(rows, draw.every, samples)
        height, width = sliding.positions(*x_NCHW.shape[2:])
        grid = sampler.grid(samples, height, width)
        rows = take_patches(x_NCHW, sliding, grid)
        return Rows(rows, grid.weight, samples * height * width)

    def output_rows(
        self,
        module: nn.Module,
        grad_output: Tensor,
        sampler: Sampler,
        *,
        weight_sharing: WeightSharing,
    ) -> Rows:
        """See `LayerIO.output_rows`."""
        g_NdPQ = _images(grad_output, "output gradient")
        samples, _, height, width = g_NdPQ.shape
        if weight_sharing == "reduce":
            draw = sampler.rows(samples)
            rows = at_least_float32(g_NdPQ[draw.slice]).sum((2, 3))
            return Rows(rows, draw.every, samples)
        grid = sampler.grid(samples, height, width)
        return Rows(take_pixels(g_NdPQ, grid), grid.weight, samples)


def _images(tensor: Tensor, what: str) -> Tensor:
    if tensor.dim() != 4:
        raise CaptureError(
            f"a Conv2d layer got an {what} of shape {tuple(tensor.shape)}: without a batch "
            "dimension samples cannot be counted; give it [N, C, H, W], e.g. x.unsqueeze(0)"
        )
    return tensor.detach()


def _sliding(conv: nn.Conv2d) -> Sliding:
    """Kernel, stride and pads, for every padding and padding_mode."""
    if conv.padding == "valid":
        pads = [(0, 0), (0, 0)]
    elif conv.padding == "same":
        # As torch does: what cannot be halved goes to the right and to the bottom.
        totals = [size - 1 for size in conv.kernel_size]
        pads = [(total // 2, total - total // 2) for total in totals]
    else:
        pads = [(size, size) for size in cast("tuple[int, int]", conv.padding)]
    kernel, stride = (cast("tuple[int, int]", size) for size in (conv.kernel_size, conv.stride))
    return Sliding(kernel, stride, (pads[0], pads[1]), conv.padding_mode)


def _means(x_NCHW: Tensor, sliding: Sliding) -> Tensor:
    """[N, C J K]: the mean over the output positions of what each kernel offset sees."""
    height, width = sliding.positions(*x_NCHW.shape[2:])
    sums_NCJK = _box_sums(sliding, sliding.padded(x_NCHW), height, width)
    return sums_NCJK.flatten(1) / (height * width)


def _box_sums(sliding: Sliding, x_NCHW: Tensor, height: int, width: int) -> Tensor:
    """[N, C, J, K]: for each kernel offset the sum over the output positions of what it sees.

    The box is separable: columns first, rows second, so the image is read K times."""
    (kernel_j, kernel_k), (stride_j, stride_k) = sliding.kernel, sliding.stride
    columns = [
        x_NCHW[..., k : k + stride_k * (width - 1) + 1 : stride_k].sum(-1) for k in range(kernel_k)
    ]
    x_NCHK = torch.stack(columns, dim=-1)
    rows = [
        x_NCHK[:, :, j : j + stride_j * (height - 1) + 1 : stride_j].sum(2) for j in range(kernel_j)
    ]
    return torch.stack(rows, dim=2)


def _sketch(
    sliding: Sliding, x_NCHW: Tensor, side: SideSpec, basis_dr: Tensor | None, bias: bool
) -> Tensors:
    basis_dr = require_basis(side, basis_dr, x_NCHW)
    weights_dr, bias_r = (basis_dr[:-1], basis_dr[-1]) if bias else (basis_dr, None)
    filters_rCJK = weights_dr.T.reshape(side.rank, x_NCHW.shape[1], *sliding.kernel)
    projected_NrPQ = F.conv2d(x_NCHW, filters_rCJK, bias_r, stride=sliding.stride)
    y_rCJK = conv2d_weight(x_NCHW, filters_rCJK.shape, projected_NrPQ, stride=sliding.stride)
    samples, _, height, width = projected_NrPQ.shape
    squares_1CHW = x_NCHW.square().sum(0, keepdim=True)
    diag_d = _box_sums(sliding, squares_1CHW, height, width).flatten()
    squares = {"trace": diag_d.sum()}
    if side.tail == "diagonal":
        squares["diag"] = diag_d
    y_bias_r = projected_NrPQ.sum((0, 2, 3)) if bias else None
    return affine_sketch(side, y_rCJK.flatten(1).T, y_bias_r, squares, samples * height * width)


def _dense(sliding: Sliding, x_NCHW: Tensor, side: SideSpec, bias: bool, positions: int) -> Tensors:
    chunk = max(1, PATCH_NUMBERS_PER_CHUNK // (side.dim * positions))
    total: Tensors = {}
    for part_nCHW in x_NCHW.split(chunk):
        patches_ndS = F.unfold(part_nCHW, sliding.kernel, stride=sliding.stride)
        rows = patches_ndS.transpose(1, 2).flatten(0, 1)
        for name, value in encode_affine_rows(side, rows, None, bias).items():
            total[name] = total[name] + value if name in total else value
    return total
