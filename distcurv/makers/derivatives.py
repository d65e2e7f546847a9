"""Derivatives of computed tensors with respect to parameters: pure, on reverse mode alone.

Products with a Jacobian are two reverse passes, the second one through the first ("double
backward"), so that the same graph, with the same dropout masks and batch statistics, serves for
all of them, and parameters need not be replaced by others.  Nothing touches ``.grad``.

Letters: P numbers of all parameters, K numbers of the outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]

_ROWS = 128  # of a dense matrix that are made at once


def pulled(
    outputs: Sequence[Tensor],
    params: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    create_graph: bool = False,
    batched: bool = False,
) -> Tensors:
    """Jᵀ u: like ``params``; zeros for those that the outputs do not depend on.

    Args:
        create_graph: for a result that can be differentiated again.
        batched: cotangents, and the result, have a first dimension of their own more.

    The outputs' graph is kept.
    """
    pairs = [(y, u) for y, u in zip(outputs, cotangents, strict=True) if y.requires_grad]
    if not pairs:
        rows = cotangents[0].shape[:1] if batched else torch.Size()
        return tuple(p.new_zeros(rows + p.shape) for p in params)
    grads = torch.autograd.grad(
        [y for y, _ in pairs],
        list(params),
        [u for _, u in pairs],
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        is_grads_batched=batched,
    )
    rows = pairs[0][1].shape[:1] if batched else torch.Size()
    return tuple(
        p.new_zeros(rows + p.shape) if g is None else g for p, g in zip(params, grads, strict=True)
    )


def gradient(loss: Tensor, params: Sequence[Tensor], *, create_graph: bool = False) -> Tensors:
    """The gradient of a scalar."""
    return pulled([loss], params, [torch.ones_like(loss)], create_graph=create_graph)


def pushed(outputs: Sequence[Tensor], params: Sequence[Tensor], tangents: Tensors) -> Tensors:
    """J v: like ``outputs``."""
    probes = [torch.zeros_like(y, requires_grad=True) for y in outputs]
    back = pulled(outputs, params, probes, create_graph=True)
    return pulled(back, probes, tangents)


def dense(outputs: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """J as a matrix [K, P]: of ``gradient(..., create_graph=True)`` the Hessian [P, P]."""
    sizes = [y.numel() for y in outputs]
    total = sum(sizes)
    rows = []
    for chosen in _slices(total):
        unit = outputs[0].new_zeros(len(chosen), total)
        unit[range(len(chosen)), list(chosen)] = 1
        cotangents = [
            part.view(len(chosen), *y.shape)
            for part, y in zip(unit.split(sizes, 1), outputs, strict=True)
        ]
        block = _pulled_rows(outputs, params, cotangents)
        rows.append(torch.cat([part.reshape(len(chosen), -1) for part in block], 1))
    return torch.cat(rows)


def _pulled_rows(
    outputs: Sequence[Tensor], params: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> Tensors:
    """`pulled` with ``batched``, also where torch cannot batch a backward (the second one of
    GroupNorm, say): one row at a time, which raises again whatever else was wrong."""
    try:
        return pulled(outputs, params, cotangents, batched=True)
    except RuntimeError:
        rows = [pulled(outputs, params, row) for row in zip(*cotangents, strict=True)]
        return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers one after the other, [P]."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def shaped(vector: Tensor, like: Sequence[Tensor]) -> Tensors:
    """The inverse of `flat`; dimensions before the last stay in front."""
    parts = vector.split([tensor.numel() for tensor in like], -1)
    return tuple(
        part.reshape(vector.shape[:-1] + tensor.shape)
        for part, tensor in zip(parts, like, strict=True)
    )


def _slices(total: int) -> Iterator[range]:
    for start in range(0, total, _ROWS):
        yield range(start, min(start + _ROWS, total))
