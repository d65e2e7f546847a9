"""One list of cases for each registered layer type, and the float64 oracle for all of them.

The oracle knows nothing of patches or padding: every supported layer is linear in its parameters,
so the input row a_ns is read off the layer's own outputs for unit parameters.  That these rows are
the right ones is tied to autograd by the test of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True)
class LayerCase:
    """``make(bias)`` a float64 module, ``input_shape`` with the samples first, ``feature_dim`` of
    the output."""

    label: str
    make: Callable[[bool], nn.Module]
    input_shape: tuple[int, ...]
    feature_dim: int


def _linear(bias: bool) -> nn.Module:
    return nn.Linear(5, 3, bias=bias, dtype=torch.float64)


def _conv(label: str, size: tuple[int, int] = (7, 6), **settings: object) -> LayerCase:
    def make(bias: bool) -> nn.Module:
        return nn.Conv2d(2, 3, bias=bias, dtype=torch.float64, **settings)  # type: ignore[arg-type]

    return LayerCase(f"conv2d-{label}", make, (4, 2, *size), feature_dim=1)


CASES: dict[type[nn.Module], list[LayerCase]] = {
    nn.Linear: [
        LayerCase("linear-2d", _linear, (7, 5), feature_dim=-1),
        LayerCase("linear-3d", _linear, (4, 3, 5), feature_dim=-1),
        LayerCase("linear-4d", _linear, (3, 2, 4, 5), feature_dim=-1),
    ],
    nn.Conv2d: [
        _conv("plain", kernel_size=3),
        _conv("pointwise", kernel_size=1),
        _conv("padding", kernel_size=3, padding=1),
        _conv("stride", kernel_size=3, stride=2, padding=(1, 2)),
        _conv("leftover", kernel_size=2, stride=(3, 4)),
        _conv("oblong", kernel_size=(2, 3), stride=(1, 2), padding=(0, 1)),
        _conv("valid", kernel_size=3, padding="valid"),
        _conv("same", kernel_size=3, padding="same"),
        _conv("same-even", kernel_size=(4, 2), padding="same"),
        _conv("whole-image", (3, 3), kernel_size=3),
        _conv("reflect", kernel_size=3, padding=2, padding_mode="reflect"),
        _conv("replicate", kernel_size=3, padding=1, padding_mode="replicate"),
        _conv("circular-same", kernel_size=(3, 2), padding="same", padding_mode="circular"),
    ],
}


def input_rows(case: LayerCase, module: nn.Module, input: Tensor, bias: bool) -> Tensor:
    """[N, S, I]: output 0 with one parameter at 1 and all others at 0 is one coordinate."""
    parameters = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    columns = []
    for name in ["weight", "bias"] if bias else ["weight"]:
        of_output_0 = parameters[name][0].reshape(-1) if name == "weight" else parameters[name][:1]
        for i in range(len(of_output_0)):
            of_output_0[i] = 1
            output = functional_call(module, parameters, (input,))
            columns.append(output.select(case.feature_dim, 0).reshape(len(input), -1))
            of_output_0[i] = 0
    return torch.stack(columns, dim=2)


def output_rows(case: LayerCase, grad_output: Tensor) -> Tensor:
    """[N, S, O]."""
    rows = grad_output.movedim(case.feature_dim, -1)
    return rows.reshape(rows.shape[0], -1, rows.shape[-1])


def input_factor(rows_NSI: Tensor, weight_sharing: str) -> tuple[Tensor, int]:
    """(sum, count) of side A."""
    if weight_sharing == "reduce":
        rows_NI = rows_NSI.mean(1)
        return rows_NI.T @ rows_NI, rows_NI.shape[0]
    rows = rows_NSI.flatten(0, 1)
    return rows.T @ rows, rows.shape[0]


def output_factor(rows_NSO: Tensor, weight_sharing: str) -> tuple[Tensor, int]:
    """(sum, count) of side G."""
    rows = rows_NSO.sum(1) if weight_sharing == "reduce" else rows_NSO.flatten(0, 1)
    return rows.T @ rows, rows_NSO.shape[0]
