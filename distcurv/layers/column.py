"""Layers seen as one side F: the numbers of a layer, or of several, one below the other.

For blocks whose curvature is no Kronecker product: the whole Fisher matrix of a layer, of each of
its rows or of several layers, or its diagonal.  The numbers of a layer are the rows of its gradient
matrix [O, I] one after the other, the bias coordinate last in each.

Letters: I = Di (+1 with the bias coordinate), O = Do, P numbers of the block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distcurv.curvature.apply import AffineGradient
from distcurv.errors import CaptureError, ShapeError
from distcurv.layers.bare import AnyLayer
from distcurv.layers.joint import JointIO
from distcurv.layers.layer import LayerIO

UNIT_ROWS = "unit_rows"  # the kind with a matrix for each output


class ColumnIO:
    """One layer of two sides as a block of one, a column [P, 1].

    Args:
        inner: the layer.
        kind: of the block, ``layer_wise``, ``unit_rows`` or ``diagonal``.
    """

    diagonal_sides: frozenset[str] = frozenset()
    weight_is_matrix = False

    def __init__(self, inner: LayerIO, kind: str) -> None:
        self.inner = inner
        self.one_sided = kind
        self.weight = inner.weight
        self.rows = inner.rows
        self.call_kind = inner.call_kind

    def parameter_names(self, module: nn.Module) -> list[str]:
        """See `LayerIO.parameter_names`."""
        return self.inner.parameter_names(module)

    def refuse(self, module: nn.Module) -> str | None:
        """See `LayerIO.refuse`."""
        return self.inner.refuse(module)

    def trains_bias(self, module: nn.Module) -> bool:
        """See `LayerIO.trains_bias`."""
        return self.inner.trains_bias(module)

    def dims(self, module: nn.Module, bias: bool) -> tuple[int, ...]:
        """The dimension of the side: (P,), or (I,) for ``unit_rows``."""
        inputs, outputs = self.inner.dims(module, bias)
        return (inputs if self.one_sided == UNIT_ROWS else inputs * outputs,)

    def units(self, module: nn.Module, bias: bool) -> int:
        """How many matrices of that dimension: O for ``unit_rows``, else one."""
        return self.inner.dims(module, bias)[1] if self.one_sided == UNIT_ROWS else 1

    def gradient(self, module: nn.Module, bias: bool) -> AffineGradient | None:
        """The ``.grad`` of the parameters as [P, 1], a copy where there is a bias."""
        grad = self.inner.gradient(module, bias)
        return None if grad is None else AffineGradient(grad.whole().reshape(-1, 1), None)

    def write_gradient(self, module: nn.Module, bias: bool, grad: AffineGradient) -> None:
        """See `LayerIO.write_gradient`."""
        now = self.inner.gradient(module, bias)
        if now is None:
            raise CaptureError(
                f"write_gradient: this {type(module).__name__} has no gradient to overwrite; "
                "call it between backward() and zero_grad()"
            )
        self.inner.write_gradient(module, bias, _like(now, grad.weight_OD))


class FullPart(NamedTuple):
    """A layer of a block of several.

    Attributes:
        module: of the layer.
        layer: how it is seen.
        bias: whether its bias belongs to the block.
        tied: further modules with the same weight.
        start, stop: where its numbers stand in the column.
    """

    module: nn.Module
    layer: LayerIO | JointIO
    bias: bool
    tied: tuple[nn.Module, ...]
    start: int
    stop: int


class FullIO:
    """Several layers as one block, a column [P, 1]; ``module`` says nothing of them.

    Args:
        layers: (module, layer, further modules with its weight), in order.
        kind: of the block, ``full``; of one layer that acts unit by unit ``layer_wise`` or
            ``diagonal`` as well.
    """

    diagonal_sides: frozenset[str] = frozenset()
    weight_is_matrix = False
    weight = ""
    rows: tuple[int, int] | None = None
    call_kind = ""

    def __init__(
        self,
        layers: Sequence[tuple[nn.Module, LayerIO | JointIO, tuple[nn.Module, ...]]],
        kind: str = "full",
    ) -> None:
        self.one_sided = kind
        self.parts: list[FullPart] = []
        stop = 0
        for module, layer, tied in layers:
            bias = layer.trains_bias(module)
            start, stop = stop, stop + _numbers(module, layer, bias)
            self.parts.append(FullPart(module, layer, bias, tied, start, stop))

    def parameter_names(self, module: nn.Module) -> list[str]:
        """None: they are those of ``parts``."""
        return []

    def refuse(self, module: nn.Module) -> str | None:
        """See `LayerIO.refuse`."""
        return None

    def trains_bias(self, module: nn.Module) -> bool:
        """False: each part has its own."""
        return False

    def dims(self, module: nn.Module, bias: bool) -> tuple[int, ...]:
        """(P,)"""
        return (self.parts[-1].stop,)

    def units(self, module: nn.Module, bias: bool) -> int:
        """One."""
        return 1

    def gradient(self, module: nn.Module, bias: bool) -> AffineGradient | None:
        """The gradients of all parts as [P, 1], a copy, zero where a part has none; None where
        none of them has."""
        grads = [part.layer.gradient(part.module, part.bias) for part in self.parts]
        some = next((grad.weight_OD for grad in grads if grad is not None), None)
        if some is None:
            return None
        columns = [
            some.new_zeros(part.stop - part.start) if grad is None else grad.whole().reshape(-1)
            for part, grad in zip(self.parts, grads, strict=True)
        ]
        return AffineGradient(torch.cat(columns).unsqueeze(1), None)

    def write_gradient(self, module: nn.Module, bias: bool, grad: AffineGradient) -> None:
        """Overwrite the ``.grad`` of the parts that have one."""
        for part in self.parts:
            now = part.layer.gradient(part.module, part.bias)
            if now is not None:
                own = _like(now, grad.weight_OD[part.start : part.stop])
                part.layer.write_gradient(part.module, part.bias, own)


Whole = ColumnIO | FullIO


def _numbers(module: nn.Module, layer: LayerIO | JointIO, bias: bool) -> int:
    dims = layer.dims(module, bias)
    return dims[0] * dims[1] if layer.one_sided is None else dims[0] * (1 + bias)


def _like(now: AffineGradient, column_P1: Tensor) -> AffineGradient:
    """The numbers as the gradient ``now`` has them."""
    outputs, columns = now.weight_OD.shape
    inputs = columns + (now.bias_O is not None)
    if column_P1.numel() != outputs * inputs:
        raise ShapeError(
            f"write_gradient got {column_P1.numel()} numbers for a layer of {outputs * inputs}"
        )
    grad_OI = column_P1.reshape(outputs, inputs)
    if now.bias_O is None:
        return AffineGradient(grad_OI, None)
    return AffineGradient(grad_OI[:, :-1].contiguous(), grad_OI[:, -1].contiguous())


def layers_of(module: nn.Module, layer: AnyLayer | Whole) -> list[tuple[nn.Module, AnyLayer]]:
    """The modules and layers that a block is made of: one, but for a `FullIO`."""
    if isinstance(layer, FullIO):
        return [(part.module, part.layer) for part in layer.parts]
    return [(module, layer.inner if isinstance(layer, ColumnIO) else layer)]
