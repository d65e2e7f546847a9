"""What Linear and the convolutions share: a weight [Do, ...], a bias [Do] or none.

Letters: I = Di (+1 with the bias coordinate), O = Do.
"""

from __future__ import annotations

from torch import Tensor, nn

from distcurv.curvature.apply import AffineGradient
from distcurv.errors import CaptureError, ShapeError


class WeightBias:
    """The parts of `LayerIO` that only look at ``weight`` (first dimension O) and ``bias``."""

    def refuse(self, module: nn.Module) -> str | None:
        """See `LayerIO.refuse`."""
        weight = module._parameters.get("weight")
        if weight is None:
            return "its weight is computed from other parameters (weight_norm or alike)"
        if not weight.requires_grad:
            return "its weight is frozen"
        return None

    def trains_bias(self, module: nn.Module) -> bool:
        """See `LayerIO.trains_bias`."""
        bias = module._parameters.get("bias")
        return bias is not None and bias.requires_grad

    def dims(self, module: nn.Module, bias: bool) -> tuple[int, int]:
        """See `LayerIO.dims`."""
        weight = module.get_parameter("weight")
        outputs = weight.shape[0]
        return weight.numel() // outputs + int(bias), outputs

    def gradient(self, module: nn.Module, bias: bool) -> AffineGradient | None:
        """See `LayerIO.gradient`."""
        grads = _grads(module, bias)
        if grads is None:
            return None
        weight_grad, bias_grad = grads
        return AffineGradient(weight_grad.flatten(1), bias_grad)

    def write_gradient(self, module: nn.Module, bias: bool, grad: AffineGradient) -> None:
        """See `LayerIO.write_gradient`."""
        inputs, outputs = self.dims(module, bias)
        weight_OD, bias_O = grad
        if weight_OD.shape != (outputs, inputs - bias) or (bias_O is None) is bias:
            columns = "no bias" if bias_O is None else "a bias"
            raise ShapeError(
                f"write_gradient got a weight's gradient {tuple(weight_OD.shape)} and {columns} "
                f"for a {type(module).__name__}: it must be ({outputs}, {inputs - bias}), "
                f"{'with' if bias else 'without'} a bias"
            )
        grads = _grads(module, bias)
        if grads is None:
            raise CaptureError(
                f"write_gradient: this {type(module).__name__} has no gradient to overwrite; "
                "call it between backward() and zero_grad()"
            )
        for target, source in zip(grads, grad, strict=True):
            # Of one place in memory there is nothing to copy.
            if target is None or source is None or target.data_ptr() == source.data_ptr():
                continue
            target.copy_(source.view(target.shape))


def _grads(module: nn.Module, bias: bool) -> tuple[Tensor, Tensor | None] | None:
    weight_grad = module.get_parameter("weight").grad
    if weight_grad is None:
        return None
    if not bias:
        return weight_grad, None
    bias_grad = module.get_parameter("bias").grad
    if bias_grad is None:
        raise CaptureError(
            f"this {type(module).__name__} has a weight gradient but no bias gradient, although "
            "its block counts the bias: was the bias frozen after the preconditioner was made? "
            "Make it anew after freezing"
        )
    return weight_grad, bias_grad
