"""One list of cases for each registered layer type, and the float64 oracle for all of them.

The oracle knows nothing of patches or padding: every supported layer is linear in its parameters,
so the input row a_ns is read off the layer's own outputs for unit parameters.  That these rows are
the right ones is tied to autograd by the test of the gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class LayerCase:
    """``make(bias)`` a float64 module, ``input_shape`` with the samples first, ``feature_dim`` of
    the output, ``groups`` of outputs that see inputs of their own."""

    label: str
    make: Callable[[bool], nn.Module]
    input_shape: tuple[int, ...]
    feature_dim: int
    groups: int = 1


def _linear(bias: bool) -> nn.Module:
    return nn.Linear(5, 3, bias=bias, dtype=torch.float64)


def _huggingface(bias: bool) -> nn.Module:
    module = Conv1D(3, 5).double()
    if not bias:  # frozen: such a module always has one
        module.bias.requires_grad_(False)
    return module


CONVOLUTIONS: dict[type[nn.Module], int] = {
    nn.Conv1d: 1,
    nn.Conv2d: 2,
    nn.Conv3d: 3,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 2,
    nn.ConvTranspose3d: 3,
}
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SIZES = {1: (9,), 2: (7, 6), 3: (4, 5, 3)}
SMALL = {1: (5,), 2: (3, 2), 3: (2, 3, 2)}  # transposed convolutions make them larger


def _conv(
    kind: type[nn.Module],
    label: str,
    size: tuple[int, ...] | None = None,
    channels: tuple[int, int] = (2, 3),
    **settings: object,
) -> LayerCase:
    def make(bias: bool) -> nn.Module:
        return kind(*channels, bias=bias, dtype=torch.float64, **settings)

    axes = CONVOLUTIONS[kind]
    sizes = SMALL if kind in TRANSPOSED else SIZES
    shape = (4 if axes < 3 else 2, channels[0], *(size or sizes[axes]))
    groups = settings.get("groups", 1)
    assert isinstance(groups, int)
    return LayerCase(f"{kind.__name__}-{label}", make, shape, feature_dim=1, groups=groups)


def _plain_and_modes(kind: type[nn.Module]) -> list[LayerCase]:
    """What every convolution is tested with."""
    return [
        _conv(kind, "plain", kernel_size=3),
        _conv(kind, "pointwise", kernel_size=1),
        _conv(kind, "same-dilated", kernel_size=2, padding="same", dilation=3),
        _conv(kind, "reflect", kernel_size=3, padding=2, padding_mode="reflect"),
        _conv(kind, "replicate", kernel_size=3, padding=1, padding_mode="replicate"),
        _conv(kind, "groups", channels=(4, 6), kernel_size=2, groups=2, stride=2),
        _conv(kind, "depthwise", channels=(3, 6), kernel_size=3, groups=3, padding=1, dilation=2),
        _conv(kind, "everything", channels=(4, 2), kernel_size=2, groups=2, padding=1, stride=2,
              dilation=2, padding_mode="circular"),
    ]  # fmt: skip


def _transposed(kind: type[nn.Module]) -> list[LayerCase]:
    return [
        _conv(kind, "plain", kernel_size=3),
        _conv(kind, "pointwise", kernel_size=1),
        _conv(kind, "stride", kernel_size=3, stride=2, padding=1, output_padding=1),
        _conv(kind, "dilation", kernel_size=2, stride=2, dilation=3, padding=2),
        _conv(kind, "cropped", kernel_size=2, stride=3, padding=2),
        _conv(kind, "sparse", kernel_size=1, stride=2, output_padding=1),
        _conv(kind, "wide-output-padding", kernel_size=2, stride=2, dilation=4, padding=1,
              output_padding=3),
        _conv(kind, "groups", channels=(4, 6), kernel_size=3, stride=2, groups=2, padding=1),
        _conv(kind, "depthwise", channels=(3, 6), kernel_size=2, groups=3, dilation=2),
    ]  # fmt: skip


CASES: dict[type[nn.Module], list[LayerCase]] = {
    nn.Linear: [
        LayerCase("linear-2d", _linear, (7, 5), feature_dim=-1),
        LayerCase("linear-3d", _linear, (4, 3, 5), feature_dim=-1),
        LayerCase("linear-4d", _linear, (3, 2, 4, 5), feature_dim=-1),
    ],
    nn.Conv1d: _plain_and_modes(nn.Conv1d),
    nn.Conv2d: [
        *_plain_and_modes(nn.Conv2d),
        _conv(nn.Conv2d, "padding", kernel_size=3, padding=1),
        _conv(nn.Conv2d, "stride", kernel_size=3, stride=2, padding=(1, 2)),
        _conv(nn.Conv2d, "leftover", kernel_size=2, stride=(3, 4)),
        _conv(nn.Conv2d, "oblong", kernel_size=(2, 3), stride=(1, 2), padding=(0, 1)),
        _conv(nn.Conv2d, "valid", kernel_size=3, padding="valid"),
        _conv(nn.Conv2d, "same", kernel_size=3, padding="same"),
        _conv(nn.Conv2d, "same-even", kernel_size=(4, 2), padding="same"),
        _conv(nn.Conv2d, "whole-image", (3, 3), kernel_size=3),
        _conv(nn.Conv2d, "circular-same", kernel_size=(3, 2), padding="same",
              padding_mode="circular"),
    ],
    nn.Conv3d: [
        *_plain_and_modes(nn.Conv3d),
        _conv(nn.Conv3d, "oblong", kernel_size=(2, 3, 1), stride=(1, 2, 3), padding=(0, 1, 2)),
    ],
    nn.ConvTranspose1d: _transposed(nn.ConvTranspose1d),
    nn.ConvTranspose2d: [
        *_transposed(nn.ConvTranspose2d),
        _conv(nn.ConvTranspose2d, "oblong", kernel_size=(2, 3), stride=(3, 1), padding=(0, 1),
              output_padding=(2, 0)),
    ],
    nn.ConvTranspose3d: _transposed(nn.ConvTranspose3d),
    Conv1D: [
        LayerCase("huggingface-2d", _huggingface, (7, 5), feature_dim=-1),
        LayerCase("huggingface-3d", _huggingface, (4, 3, 5), feature_dim=-1),
    ],
}  # fmt: skip


def weight_of_output(module: nn.Module, weight: Tensor, o: int) -> Tensor:
    """The part of a weight (a view) that output o alone depends on: its row of the matrix."""
    if isinstance(module, TRANSPOSED):
        group, within = divmod(o, weight.shape[1])
        inputs = module.in_channels // module.groups
        return weight[group * inputs : (group + 1) * inputs, within]
    return weight[:, o] if isinstance(module, Conv1D) else weight[o]


def grouped_rows(case: LayerCase, module: nn.Module, input: Tensor, bias: bool) -> Tensor:
    """[groups, N, S, I]: the first output of a group with one parameter at 1 and all others at 0
    is one coordinate of what the group sees."""
    parameters = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    outputs = module(input).shape[case.feature_dim]
    of_groups = []
    for first in range(0, outputs, outputs // case.groups):
        columns = []
        own = weight_of_output(module, parameters["weight"], first)
        places = [(own, place) for place in itertools.product(*map(range, own.shape))]
        if bias:
            places.append((parameters["bias"], (first,)))
        for tensor, place in places:
            tensor[place] = 1
            output = functional_call(module, parameters, (input,))
            columns.append(output.select(case.feature_dim, first).reshape(len(input), -1))
            tensor[place] = 0
        of_groups.append(torch.stack(columns, dim=2))
    return torch.stack(of_groups)


def input_rows(case: LayerCase, module: nn.Module, input: Tensor, bias: bool) -> Tensor:
    """[N groups, S, I]: the groups share side A as if they were further samples."""
    return grouped_rows(case, module, input, bias).flatten(0, 1)


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
