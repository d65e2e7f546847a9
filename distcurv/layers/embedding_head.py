"""An embedding whose weight [V, D] is a block of Linear layout: tied to an output head, or used by
`F.embedding` alone.

Seen as a matrix of V outputs and D inputs, the gradient of an embedding is sum e_v g^T over the
tokens, with e_v the unit vector of the token's id and g the output gradient: the sides have
changed places.  Side G (V) gets the counts of the ids, side A (D) the output gradients.

Letters: N samples, S tokens of a sample, V ids, D features, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distcurv.curvature.precision import at_least_float32
from distcurv.curvature.spec import SideSpec, Tensors
from distcurv.curvature.triangle import pack_triangle
from distcurv.errors import CaptureError
from distcurv.layers.affine_rows import encode_affine_rows, require_basis
from distcurv.layers.layer import WeightSharing


def id_counts(ids: Tensor, size: int, padding_idx: int | None) -> Tensor:
    """How often each id occurs [V], float32; the padding id never does: its row gets no gradient.

    Raises `CaptureError` for ids of another dtype than an integer one."""
    if ids.is_floating_point():
        raise CaptureError(f"an embedding got ids of dtype {ids.dtype}: give integers")
    counts_V = torch.zeros(size, device=ids.device)
    counts_V.scatter_add_(0, ids.flatten(), torch.ones((), device=ids.device).expand(ids.numel()))
    if padding_idx is not None:
        counts_V[padding_idx] = 0
    return counts_V


def encode_counts(side: SideSpec, counts_V: Tensor, basis_Vr: Tensor | None) -> Tensors:
    """The statistic of the rows e_v: that of the diagonal matrix of the counts, in any encoding."""
    if side.encoding == "diagonal":
        return {"diag": counts_V}
    if side.encoding == "dense":
        return {"packed": pack_triangle(torch.diag(counts_V))}
    basis_Vr = require_basis(side, basis_Vr, counts_V)
    statistic = {"Y": counts_V.unsqueeze(-1) * basis_Vr, "trace": counts_V.sum()}
    if side.tail == "diagonal":
        statistic["diag"] = counts_V
    return statistic


def encode_token_gradients(
    side: SideSpec,
    grad_output: Tensor,
    ids: Tensor,
    basis_Dr: Tensor | None,
    padding_idx: int | None,
    weight_sharing: WeightSharing,
) -> Tensors:
    """Side A from the output gradients [N, ..., D]: those of the padding id have no part."""
    g_ND = at_least_float32(grad_output.detach()).reshape(-1, side.dim)
    if padding_idx is not None:
        g_ND = g_ND * (ids.reshape(-1, 1) != padding_idx)
    if weight_sharing == "reduce":
        g_ND = g_ND.view(ids.shape[0], -1, side.dim).sum(1)
    return encode_affine_rows(side, g_ND, basis_Dr, bias=False)
