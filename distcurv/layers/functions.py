"""The functions that use a parameter as a layer does, and what stands in for the layer then.

For parameters of modules that no registry entry matches (fused blocks, custom attention,
functional code): the call itself has all that a layer's methods read of a module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Sizes = int | tuple[int, ...]


@dataclass(frozen=True)
class ConvCall:
    """What stands in for a convolution module; the attributes are as there."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str = "zeros"


class FunctionCall(NamedTuple):
    """A call of one of `FUNCTIONS`, with its arguments by meaning.

    Attributes:
        kind: ``linear | conv | embedding``.
        how: what stands in for a module; None where nothing is to be said.
        padding_idx: of an embedding, >= 0.
    """

    kind: str
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    how: object = None
    padding_idx: int | None = None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> FunctionCall:
    return FunctionCall("linear", input, weight, bias)


def _conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> FunctionCall:
    spatial = weight.dim() - 2
    call = ConvCall(
        tuple(weight.shape[2:]),
        _sizes(stride, spatial),
        padding if isinstance(padding, str) else _sizes(padding, spatial),
        _sizes(dilation, spatial),
        groups,
    )
    return FunctionCall("conv", input, weight, bias, call)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> FunctionCall:
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    # What changes weight or gradient on the way is no plain look-up.
    plain = max_norm is None and not scale_grad_by_freq and not sparse
    return FunctionCall(
        "embedding" if plain else "other", input, weight, None, padding_idx=padding_idx
    )


def _sizes(size: Sizes, spatial: int) -> tuple[int, ...]:
    if isinstance(size, int):
        return (size,) * spatial
    sizes = tuple(size)
    return sizes * spatial if len(sizes) == 1 else sizes


# Every place where a function is looked up: (namespace, name) and what reads its arguments.
FUNCTIONS: list[tuple[Any, str, Callable[..., FunctionCall]]] = [
    (F, "linear", _linear),
    (F, "conv1d", _conv),
    (F, "conv2d", _conv),
    (F, "conv3d", _conv),
    (F, "embedding", _embedding),
    (torch, "conv1d", _conv),
    (torch, "conv2d", _conv),
    (torch, "conv3d", _conv),
]
