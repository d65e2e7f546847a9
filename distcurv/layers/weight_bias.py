"""What Linear and the convolutions share: a weight [Do, ...], a bias [Do] or none; or rows of them.

Letters: I = Di (+1 with the bias coordinate), O = Do.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from distcurv.curvature.apply import AffineGradient
from distcurv.errors import CaptureError, ShapeError
from distcurv.layers.local_part import own_part, row_numbers


class WeightBias:
    """The parts of `LayerIO` that only look at a weight (first dimension O) and a bias.

    Args:
        weight: the name of the module's parameter.
        bias: that of its bias, which may be missing or None in the module; None: never one.
        rows: (start, stop): the block is only these outputs, rows of both; None for all of them.
        bias_rows: of a bias that has other rows than the weight; by default ``rows``.
    """

    one_sided: str | None = None
    diagonal_sides: frozenset[str] = frozenset()
    weight_is_matrix = True
    call_kind = ""

    def __init__(
        self,
        weight: str = "weight",
        bias: str | None = "bias",
        rows: tuple[int, int] | None = None,
        *,
        bias_rows: tuple[int, int] | None = None,
    ) -> None:
        self.weight = weight
        self.bias = bias
        self.rows = rows
        self.bias_rows = rows if bias_rows is None else bias_rows

    def parameter_names(self, module: nn.Module) -> list[str]:
        """See `LayerIO.parameter_names`."""
        return [self.weight, *([self.bias] if self.bias and self.trains_bias(module) else [])]

    def refuse(self, module: nn.Module) -> str | None:
        """See `LayerIO.refuse`."""
        weight = module._parameters.get(self.weight)
        if weight is None:
            return f"its {self.weight} is computed from other parameters (weight_norm or alike)"
        if isinstance(weight, UninitializedParameter):
            return "it is lazy and has no shape yet: run the model once before"
        if not weight.requires_grad:
            return f"its {self.weight} is frozen"
        return None

    def counted_positions(self, module: nn.Module, input: Tensor) -> Tensor | None:
        """See `LayerIO.counted_positions`: all of them."""
        return None

    def trains_bias(self, module: nn.Module) -> bool:
        """See `LayerIO.trains_bias`."""
        bias = module._parameters.get(self.bias) if self.bias else None
        return bias is not None and bias.requires_grad

    def dims(self, module: nn.Module, bias: bool) -> tuple[int, ...]:
        """See `LayerIO.dims`."""
        weight = module.get_parameter(self.weight)
        outputs = weight.shape[0]
        inputs = weight.numel() // outputs + int(bias)
        return inputs, outputs if self.rows is None else self.rows[1] - self.rows[0]

    def gradient(self, module: nn.Module, bias: bool) -> AffineGradient | None:
        """See `LayerIO.gradient`."""
        grads = self._grads(module, bias)
        if grads is None:
            return None
        weight_grad, bias_grad = grads
        return AffineGradient(weight_grad.flatten(1), bias_grad)

    def write_gradient(self, module: nn.Module, bias: bool, grad: AffineGradient) -> None:
        """See `LayerIO.write_gradient`."""
        grads = self._grads(module, bias)
        if grads is None:
            raise CaptureError(
                f"write_gradient: this {type(module).__name__} has no gradient to overwrite; "
                "call it between backward() and zero_grad()"
            )
        weight_OD, bias_O = grad
        wanted = (len(grads[0]), row_numbers(grads[0]))
        if weight_OD.shape != wanted or (bias_O is None) is bias:
            columns = "no bias" if bias_O is None else "a bias"
            raise ShapeError(
                f"write_gradient got a weight's gradient {tuple(weight_OD.shape)} and {columns} "
                f"for a {type(module).__name__}: it must be {wanted}, "
                f"{'with' if bias else 'without'} a bias"
            )
        for target, source in zip(grads, grad, strict=True):
            # Of one place in memory there is nothing to copy.
            if target is None or source is None or target.data_ptr() == source.data_ptr():
                continue
            target.copy_(source.view(target.shape))

    def _grads(self, module: nn.Module, bias: bool) -> tuple[Tensor, Tensor | None] | None:
        weight_grad = module.get_parameter(self.weight).grad
        if weight_grad is None:
            return None
        if not bias:
            return own_part(weight_grad, self.rows), None
        assert self.bias is not None
        bias_grad = module.get_parameter(self.bias).grad
        if bias_grad is None:
            raise CaptureError(
                f"this {type(module).__name__} has a weight gradient but no bias gradient, "
                "although its block counts the bias: was the bias frozen after the preconditioner "
                "was made? Make it anew after freezing"
            )
        return own_part(weight_grad, self.rows), own_part(bias_grad, self.bias_rows)
