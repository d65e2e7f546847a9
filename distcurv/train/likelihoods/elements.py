"""What losses share whose terms are single outputs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distcurv.errors import ShapeError


def one_at_a_time(values: Tensor) -> Iterator[Tensor]:
    """The factors of a diagonal Hessian: from its root [N, ...], for each element k of a sample
    the tensor that has the k-th elements of all samples and zeros elsewhere."""
    elements = values[:1].numel()
    flat = values.reshape(len(values), elements)
    for k in range(elements):
        factor = torch.zeros_like(flat)
        factor[:, k] = flat[:, k]
        yield factor.view(values.shape)


def check_shape(who: str, logits: Tensor, **others: Tensor | None) -> None:
    """Raises `ShapeError` for logits without a dimension of samples, and for others that do not
    broadcast to them."""
    shape = tuple(logits.shape)
    if logits.dim() < 1:
        raise ShapeError(f"{who} got logits without a dimension: give [N, ...]")
    for name, tensor in others.items():
        if tensor is None:
            continue
        sizes = zip(reversed(tensor.shape), reversed(shape), strict=False)
        if tensor.dim() > len(shape) or any(own not in (1, size) for own, size in sizes):
            raise ShapeError(
                f"{who} got {name} of shape {tuple(tensor.shape)} for logits of shape {shape}: "
                f"{name} must broadcast to the logits"
            )
