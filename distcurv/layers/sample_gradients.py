"""Per-sample gradients of any layer with two sides, from all rows of one call.

A sample's gradient is the sum over its positions of the products of output gradient and input row,
[O, I].  They are as large as the gradient for every sample: callers go through the samples in
chunks.

Letters: N samples, S positions, I = Di (+1 with the bias coordinate), O = Do, V ids.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from distcurv.curvature.precision import at_least_float32
from distcurv.curvature.row_draw import Sampler
from distcurv.errors import CaptureError
from distcurv.layers.layer import LayerIO

# About so many numbers of rows or of gradients are held at a time.
NUMBERS_PER_CHUNK = 1 << 24

_ALL_ROWS = Sampler(1 << 62, 0)


def sample_gradients(
    layer: LayerIO, how: object, input: Tensor, grad_output: Tensor, *, bias: bool
) -> Tensor:
    """[N, O, I] of the samples given, at least float32.

    Args:
        layer: with its outputs grouped one group after the other, where ``how`` has groups.
        how: the module, or what stands in for it, see `LayerIO`.
        input: of the call, dimension 0 the samples; ids for an embedding.
        grad_output: the gradient of the call's output for the same samples, zero at positions that
            `LayerIO.counted_positions` excludes.
        bias: append the bias coordinate.

    Raises `CaptureError` for tensors that are not of the same samples."""
    samples = len(input)
    g_rows = layer.output_rows(
        how,  # type: ignore[arg-type]
        grad_output,
        _ALL_ROWS,
        weight_sharing="expand",
    ).rows_nd
    if "A" in layer.diagonal_sides:
        ids = int(layer.dims(how, False)[0])  # type: ignore[arg-type]
        x_rows = one_hot(input, ids, g_rows)
    else:
        x_rows = layer.input_rows(
            how,  # type: ignore[arg-type]
            input,
            _ALL_ROWS,
            weight_sharing="expand",
        ).rows_nd
    groups, rest = divmod(len(x_rows), max(1, len(g_rows)))
    if rest or not samples or len(g_rows) % samples:
        raise CaptureError(
            f"a layer's input of shape {tuple(input.shape)} has {len(x_rows)} rows and its output "
            f"gradient of shape {tuple(grad_output.shape)} has {len(g_rows)}: they are not of the "
            "same samples"
        )
    x_NgSD = at_least_float32(x_rows).view(samples, groups, -1, x_rows.shape[1])
    g_NgSo = at_least_float32(g_rows).view(samples, -1, groups, g_rows.shape[1] // groups)
    g_NgSo = g_NgSo.transpose(1, 2)
    grads_NOD = (g_NgSo.mT @ x_NgSD.to(g_NgSo.dtype)).flatten(1, 2)
    if not bias:
        return grads_NOD
    return torch.cat([grads_NOD, g_NgSo.sum(2).flatten(1).unsqueeze(-1)], -1)


def token_gradients(ids: Tensor, grad_output: Tensor, size: int) -> Tensor:
    """[N, V, D] of an embedding whose block is V outputs and D inputs: the sides have changed
    places.  ``grad_output`` is zero where the padding id stands."""
    g_NSD = at_least_float32(grad_output).reshape(len(ids), -1, grad_output.shape[-1])
    e_NSV = one_hot(ids, size, g_NSD).view(len(ids), -1, size)
    return e_NSV.mT @ g_NSD


def one_hot(ids: Tensor, size: int, like: Tensor) -> Tensor:
    """The unit vectors of the ids [n, V].  Raises `CaptureError` for ids that are no integers."""
    if ids.is_floating_point():
        raise CaptureError(f"an embedding got ids of dtype {ids.dtype}: give integers")
    return F.one_hot(ids.flatten().long(), size).to(at_least_float32(like).dtype)
