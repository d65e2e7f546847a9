"""Layers whose weight does not have the outputs as its first dimension.

Their gradient's matrix is a rearrangement of the weight's gradient: a view where memory allows,
else a copy that `write_gradient` writes back.

Letters: O = Do, D = Di without the bias coordinate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from distcurv.curvature.apply import AffineGradient
from distcurv.errors import CaptureError, ShapeError
from distcurv.layers.weight_bias import WeightBias


class PermutedWeight(WeightBias, ABC):
    """`WeightBias` for a weight that `outputs_first` turns round; never rows of one."""

    weight_is_matrix = False
    call_kind = ""

    def __init__(self, weight: str = "weight", bias: str | None = "bias") -> None:
        super().__init__(weight, bias)

    @abstractmethod
    def outputs_first(self, module: nn.Module, weight: Tensor) -> Tensor:
        """The weight, or its gradient, with its dimensions rearranged, always a view.  The first
        dimensions together are the outputs, the others the inputs: ``reshape(O, D)`` is the
        matrix."""
        ...

    @abstractmethod
    def outputs(self, module: nn.Module) -> int:
        """O"""
        ...

    def dims(self, module: nn.Module, bias: bool) -> tuple[int, ...]:
        """See `LayerIO.dims`."""
        outputs = self.outputs(module)
        return module.get_parameter(self.weight).numel() // outputs + int(bias), outputs

    def gradient(self, module: nn.Module, bias: bool) -> AffineGradient | None:
        """See `LayerIO.gradient`."""
        grads = self._grads(module, bias)
        if grads is None:
            return None
        return AffineGradient(self._matrix(module, grads[0]), grads[1])

    def write_gradient(self, module: nn.Module, bias: bool, grad: AffineGradient) -> None:
        """See `LayerIO.write_gradient`."""
        grads = self._grads(module, bias)
        if grads is None:
            raise CaptureError(
                f"write_gradient: this {type(module).__name__} has no gradient to overwrite; "
                "call it between backward() and zero_grad()"
            )
        weight_grad, bias_grad = grads
        weight_OD, bias_O = grad
        outputs = self.outputs(module)
        wanted = (outputs, weight_grad.numel() // outputs)
        if weight_OD.shape != wanted or (bias_O is None) is bias:
            columns = "no bias" if bias_O is None else "a bias"
            raise ShapeError(
                f"write_gradient got a weight's gradient {tuple(weight_OD.shape)} and {columns} "
                f"for a {type(module).__name__}: it must be {wanted}, "
                f"{'with' if bias else 'without'} a bias"
            )
        targets = (self.outputs_first(module, weight_grad), bias_grad)
        for target, source in zip(targets, grad, strict=True):
            # Of one place in memory there is nothing to copy.
            if target is None or source is None or target.data_ptr() == source.data_ptr():
                continue
            target.copy_(source.reshape(target.shape))

    def _matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        outputs = self.outputs(module)
        return self.outputs_first(module, weight).reshape(outputs, weight.numel() // outputs)
