"""`Bias` and `Scale`, modules with one parameter that is added or multiplied, and their capture.

As in ASDL (https://github.com/kazukiosawa/asdl, `asdl/operations`), where they hold one number, for
networks without normalisation (Fixup and alike).  Here they may hold a tensor of any shape that
broadcasts against a sample.

Letters: N samples, n of them looked at, U entries of the parameter.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from distcurv.curvature.row_draw import Sampler
from distcurv.curvature.spec import Tensors
from distcurv.errors import CaptureError
from distcurv.layers.joint import (
    Kept,
    UnitWeights,
    draw_samples,
    drawn_gradient,
    keep_input,
    squares_and_count,
)


class Bias(nn.Module):
    """input + weight, with ``weight`` of this shape (by default one number), zero at the start.

    Args:
        shape: broadcasts against the last dimensions of the input: ``Bias(C)`` after a Linear,
            ``Bias(C, 1, 1)`` after a Conv2d.
        device, dtype: of the parameter.
    """

    def __init__(self, *shape: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape or (1,), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """To zero."""
        nn.init.zeros_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """See the class."""
        return input + self.weight

    def extra_repr(self) -> str:
        """The shape."""
        return ", ".join(map(str, self.weight.shape))


class Scale(Bias):
    """input × weight, with ``weight`` as in `Bias`, one at the start."""

    def reset_parameters(self) -> None:
        """To one."""
        nn.init.ones_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """See the class."""
        return input * self.weight


class BiasIO(UnitWeights):
    """`JointIO` of `Bias`: kind diagonal."""

    one_sided: str = "diagonal"

    def __init__(self) -> None:
        super().__init__(bias=None)

    def keep(self, module: nn.Module, input: Tensor, sampler: Sampler | None) -> Kept:
        """See `JointIO.keep`; nothing of the input is needed."""
        _per_sample_shape(cast(Bias, module), input)
        return Kept({}, draw_samples(len(input), _positions(input), sampler), len(input))

    def statistic(
        self, module: nn.Module, kept: Kept, grad_output: Tensor, *, bias: bool
    ) -> Tensors:
        """See `JointIO.statistic`."""
        grads_nU1 = self.sample_gradients(module, kept, grad_output, bias=bias)
        return squares_and_count(kept, grads_nU1.squeeze(-1))

    def sample_gradients(
        self, module: nn.Module, kept: Kept, grad_output: Tensor, *, bias: bool
    ) -> Tensor:
        """See `ShowsSamples.sample_gradients`."""
        grad = drawn_gradient(kept, grad_output)
        return _sum_per_sample(cast(Bias, module), grad).unsqueeze(-1)


class ScaleIO(BiasIO):
    """`JointIO` of `Scale`: kind diagonal."""

    def keep(self, module: nn.Module, input: Tensor, sampler: Sampler | None) -> Kept:
        """See `JointIO.keep`."""
        _per_sample_shape(cast(Scale, module), input)
        return keep_input(input, _positions(input), sampler)

    def sample_gradients(
        self, module: nn.Module, kept: Kept, grad_output: Tensor, *, bias: bool
    ) -> Tensor:
        """See `ShowsSamples.sample_gradients`."""
        grad = drawn_gradient(kept, grad_output) * kept.input()
        return _sum_per_sample(cast(Scale, module), grad).unsqueeze(-1)


def _positions(input: Tensor) -> int:
    """Every number but those of the last dimension counts as one."""
    return input.shape[1:-1].numel()


def _per_sample_shape(module: Bias, tensor: Tensor) -> tuple[int, ...]:
    """The parameter's shape without leading ones.  Raises `CaptureError` where it reaches the
    dimension of the samples."""
    shape = tuple(module.weight.shape)
    first = next((i for i, size in enumerate(shape) if size != 1), len(shape))
    if len(shape) > tensor.dim() or len(shape) - first >= tensor.dim():
        raise CaptureError(
            f"a {type(module).__name__} of shape {shape} got an input of shape "
            f"{tuple(tensor.shape)}: dimension 0 must be the samples, which share the parameter"
        )
    return shape[first:]


def _sum_per_sample(module: Bias, grad: Tensor) -> Tensor:
    """[n, U] from [n, ...]: the sum over all dimensions that the parameter was broadcast over."""
    shape = _per_sample_shape(module, grad)
    ones = (1,) * (grad.dim() - 1 - len(shape))
    return grad.sum_to_size(len(grad), *ones, *shape).reshape(len(grad), module.weight.numel())
