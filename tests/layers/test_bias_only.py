"""A trained bias without its weight, for every layer that may have one, against autograd.

Tolerance: 1e-12 relative to the largest entry, plus 1e-12 (float64)."""

from __future__ import annotations

import pytest
import torch
from joint_cases import JOINT_CASES, randomised, sample_gradients
from test_joint_layers import assert_close
from torch import nn

from distcurv.curvature.apply import AffineGradient
from distcurv.curvature.row_draw import Sampler
from distcurv.errors import CaptureError
from distcurv.layers.bias_only import BiasOnlyIO

LINEAR_AND_CONVOLUTIONS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(4, 3), (5, 4)),
    (nn.Linear(4, 3), (5, 2, 3, 4)),
    (nn.Conv1d(2, 3, 2), (5, 2, 4)),
    (nn.Conv2d(2, 4, 2, padding=1, groups=2), (5, 2, 3, 4)),
    (nn.Conv3d(1, 2, 2), (4, 1, 3, 2, 2)),
    (nn.ConvTranspose1d(2, 3, 2), (5, 2, 4)),
    (nn.ConvTranspose2d(2, 3, 2, stride=2), (5, 2, 2, 3)),
    (nn.ConvTranspose3d(1, 2, 2), (4, 1, 2, 2, 2)),
]
NORMS = [
    (case.make(True), case.input_shape)
    for cases in JOINT_CASES.values()
    for case in cases
    if case.has_bias
]
BOTH = pytest.mark.parametrize(
    "module,shape",
    [*LINEAR_AND_CONVOLUTIONS, *NORMS],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)


@BOTH
def test_statistic_and_gradient_of_the_bias_alone(
    module: nn.Module, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    module, layer = randomised(module), BiasOnlyIO()
    module.get_parameter("weight").requires_grad_(False)
    module.zero_grad()
    assert layer.refuse(module) is None and layer.one_sided == "diagonal"
    assert layer.parameter_names(module) == ["bias"] and not layer.trains_bias(module)
    input = torch.randn(shape, dtype=torch.float64)
    output = module(input)
    grad = torch.randn_like(output)
    per_sample = sample_gradients(module, input, grad, "bias")
    assert layer.dims(module, False) == (per_sample.shape[1],)

    kept = layer.keep(module, input, None)
    statistic = layer.statistic(module, kept, grad, bias=False)
    assert kept.tensors == {} and set(statistic) == {"diag", "count"}
    assert statistic["count"].item() == shape[0]
    assert_close(statistic["diag"], per_sample.square().sum(0))

    weight = layer.keep(module, input, Sampler(1, 0)).weight
    assert weight == shape[0]  # one sample at a time
    for number in range(weight):
        kept = layer.keep(module, input, Sampler(1, number))
        drawn = layer.statistic(module, kept, grad, bias=False)
        assert_close(drawn["diag"], per_sample[number].square())

    assert layer.gradient(module, False) is None
    output.backward(grad)
    read = layer.gradient(module, False)
    assert read is not None and read.bias_O is None
    assert_close(read.weight_OD.squeeze(1), per_sample.sum(0))
    layer.write_gradient(module, False, AffineGradient(3 * read.weight_OD, None))
    written = module.get_parameter("bias").grad
    assert written is not None
    assert_close(written.flatten(), 3 * per_sample.sum(0))


def test_some_rows_of_a_bias() -> None:
    attention, layer = nn.MultiheadAttention(4, 2), BiasOnlyIO("in_proj_bias", rows=(4, 8))
    assert layer.dims(attention, False) == (4,)
    assert attention.in_proj_bias is not None
    attention.in_proj_bias.grad = torch.arange(12.0)
    read = layer.gradient(attention, False)
    assert read is not None
    assert read.weight_OD.flatten().tolist() == [4, 5, 6, 7]
    layer.write_gradient(attention, False, AffineGradient(torch.zeros(4, 1), None))
    assert attention.in_proj_bias.grad.tolist() == [0, 1, 2, 3, 0, 0, 0, 0, 8, 9, 10, 11]


def test_what_is_refused_and_why() -> None:
    layer = BiasOnlyIO()
    assert "no bias" in str(layer.refuse(nn.Linear(2, 2, bias=False)))
    frozen = nn.Linear(2, 2).requires_grad_(False)
    assert "no bias that is trained" in str(layer.refuse(frozen))
    with pytest.raises(CaptureError, match=r"Conv2d.*\(2, 5, 5\).*unsqueeze"):
        layer.keep(nn.Conv2d(2, 3, 1), torch.randn(2, 5, 5), None)
    with pytest.raises(CaptureError, match=r"Linear.*\(5,\).*unsqueeze"):
        layer.keep(nn.Linear(5, 3), torch.randn(5), None)
