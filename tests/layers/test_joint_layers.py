"""One-sided layers against per-sample gradients in float64.

Tolerance: 1e-12 relative to the largest entry, plus 1e-12; float64 sums of < 1000 terms."""

from __future__ import annotations

import pytest
import torch
from joint_cases import (
    ALL,
    JOINT_CASES,
    REFUSED_TYPES,
    JointCase,
    expected_statistic,
    joint_layer,
    randomised,
    sample_gradients,
)
from torch import Tensor, nn

from distcurv.curvature.apply import AffineGradient
from distcurv.curvature.row_draw import Sampler
from distcurv.curvature.spec import Tensors
from distcurv.errors import CaptureError, ShapeError
from distcurv.layers import LAYERS, Bias, Scale
from distcurv.layers.joint import JointIO
from distcurv.layers.norms import RMSNormIO

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
CASES = pytest.mark.parametrize("case", ALL, ids=lambda case: case.label)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max()
    assert error <= 1e-12 * (1 + expected.abs().max()), f"error {error:.2e}"


def assert_statistic(statistic: Tensors, expected: Tensors, count: int) -> None:
    assert set(statistic) == {*expected, "count"}
    assert statistic["count"].item() == count
    for name, value in expected.items():
        assert_close(statistic[name], value)


def made(case: JointCase, bias: bool, training: bool) -> tuple[nn.Module, JointIO, Tensor, Tensor]:
    torch.manual_seed(0)
    module = case.make(bias).train(training)
    input = torch.randn(case.input_shape, dtype=torch.float64) + 0.3
    return module, joint_layer(module), input, torch.randn_like(module(input))


def taken(
    layer: JointIO, module: nn.Module, input: Tensor, grad: Tensor, sampler: Sampler | None
) -> Tensors:
    """The statistic, with the weight of its samples."""
    kept = layer.keep(module, input, sampler)
    statistic = layer.statistic(module, kept, grad, bias=layer.trains_bias(module))
    return {
        name: value if name == "count" else value * kept.weight for name, value in statistic.items()
    }


def test_every_registered_one_sided_layer_has_cases() -> None:
    one_sided = {kind for kind, layer in LAYERS.items() if layer.one_sided is not None}
    assert set(JOINT_CASES) | REFUSED_TYPES == one_sided
    for module_type, cases in JOINT_CASES.items():
        assert cases
        for case in cases:
            assert type(case.make(True)) is module_type


@MODES
@CASES
def test_the_oracle_is_the_gradient_by_autograd(case: JointCase, training: bool) -> None:
    module, _, input, grad_output = made(case, True, training)
    names = [name for name, _ in module.named_parameters()]
    oracle = {name: sample_gradients(module, input, grad_output, name) for name in names}
    module(input).backward(grad_output)
    for name, per_sample in oracle.items():
        gradient = module.get_parameter(name).grad
        assert gradient is not None
        assert_close(per_sample.sum(0), gradient.flatten())
    if case.mixes and (training or module.running_mean is None):
        return
    for n in range(len(input)):
        module.zero_grad()
        module(input[n : n + 1]).backward(grad_output[n : n + 1])
        for name, per_sample in oracle.items():
            gradient = module.get_parameter(name).grad
            assert gradient is not None
            assert_close(per_sample[n], gradient.flatten())


@MODES
@pytest.mark.parametrize("bias", [True, False])
@CASES
def test_statistics_equal_those_of_per_sample_gradients(
    case: JointCase, bias: bool, training: bool
) -> None:
    module, layer, input, grad = made(case, bias, training)
    assert layer.refuse(module) is None
    assert layer.trains_bias(module) is (bias and case.has_bias)
    assert layer.dims(module, bias) == (module.get_parameter("weight").numel(),)
    expected = expected_statistic(case, module, input, grad, bias)
    for sampler in (None, Sampler(10**6, 77)):
        assert_statistic(taken(layer, module, input, grad, sampler), expected, len(input))


@MODES
@pytest.mark.parametrize("max_rows", [1, 6])
@CASES
def test_the_average_over_all_draws_is_the_statistic_of_all(
    case: JointCase, max_rows: int, training: bool
) -> None:
    module, layer, input, grad = made(case, True, training)
    if input.dim() == 4:
        input, grad = (t.contiguous(memory_format=torch.channels_last) for t in (input, grad))
    draws = layer.keep(module, input, Sampler(max_rows, 0)).weight
    total: Tensors = {}
    for number in range(draws):
        for name, value in taken(layer, module, input, grad, Sampler(max_rows, number)).items():
            total[name] = total.get(name, torch.zeros_like(value)) + value / draws
    assert_close(total.pop("count"), torch.tensor(float(len(input)), dtype=torch.float64))
    expected = expected_statistic(case, module, input, grad, True)
    for name, value in expected.items():
        assert_close(total[name], value)


@MODES
@pytest.mark.parametrize("module_type", list(JOINT_CASES), ids=lambda kind: kind.__name__)
def test_a_draw_copies_about_as_many_rows_as_asked_for(
    module_type: type[nn.Module], training: bool
) -> None:
    case = JOINT_CASES[module_type][-1]
    module, layer, _, _ = made(case, True, training)
    input = torch.randn(64, *case.input_shape[1:], dtype=torch.float64)
    before = {key: id(value) for key, value in vars(module).items()}
    kept = layer.keep(module, input, Sampler(16, 5))
    assert {key: id(value) for key, value in vars(module).items()} == before
    samples = range(*kept.samples.slice.indices(64))
    assert 1 <= len(samples) <= 16
    held = sum(tensor.numel() for tensor in kept.tensors.values())
    assert held <= len(samples) * input[0].numel() + 2 * 4  # and running statistics
    grad = torch.randn_like(module(input))
    first = layer.statistic(module, kept, grad, bias=layer.trains_bias(module))
    input.fill_(torch.nan)  # what was read in the forward has been copied
    again = layer.statistic(module, kept, grad, bias=layer.trains_bias(module))
    assert all(torch.equal(value, again[name]) for name, value in first.items())


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_drawn_samples_are_normalised_by_the_whole_batch(mean: float, last: bool) -> None:
    """In float32, where the input itself is rounded to 300 · 6e-8 of its deviation."""
    module = nn.BatchNorm2d(5)
    input = torch.randn(9, 5, 8, 6) + mean
    if last:
        input = input.contiguous(memory_format=torch.channels_last)
    kept = joint_layer(module).keep(module, input, Sampler(max_rows=150, number=1))
    assert kept.weight == 3
    expected = nn.BatchNorm2d(5).double()(input.double())[kept.samples.slice]
    error = (kept.tensors["normalised"] - expected).abs().max()
    assert error < (2e-6 if mean == 0 else 2e-4), f"error {error:.1e}"


def test_long_samples_are_looked_at_one_at_a_time() -> None:
    module, layer = nn.LayerNorm(4), joint_layer(nn.LayerNorm(4))
    kept = layer.keep(module, torch.randn(6, 100, 4), Sampler(250, 4))
    assert kept.weight == 2 and kept.tensors["input"].shape == (3, 100, 4)
    kept = layer.keep(module, torch.randn(6, 100, 4), Sampler(16, 4))
    assert kept.weight == 6 and kept.tensors["input"].shape == (1, 100, 4)


def test_an_input_that_is_not_copied_must_not_change() -> None:
    module, layer = nn.LayerNorm(4), joint_layer(nn.LayerNorm(4))
    input = torch.randn(3, 4)
    kept = layer.keep(module, input, None)
    assert kept.tensors["input"].data_ptr() == input.data_ptr()
    input.add_(1)
    with pytest.raises(CaptureError, match=r"\(3, 4\).*in place.*max_rows"):
        layer.statistic(module, kept, torch.randn(3, 4), bias=True)


@pytest.mark.parametrize("module_type", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_running_statistics_are_those_of_the_time_of_the_forward(
    module_type: type[nn.Module],
) -> None:
    case = JOINT_CASES[module_type][-1]
    module, layer, input, grad = made(case, True, False)
    expected = expected_statistic(case, module, input, grad, True)
    kept = layer.keep(module, input, None)
    module.train()
    module(input + 3)
    assert_statistic(layer.statistic(module, kept, grad, bias=True), expected, len(input))


@MODES
@pytest.mark.parametrize("module_type", list(JOINT_CASES), ids=lambda kind: kind.__name__)
def test_half_precision_is_summed_in_float32(module_type: type[nn.Module], training: bool) -> None:
    module, layer, input, grad = made(JOINT_CASES[module_type][-1], True, training)
    module, input, grad = module.float(), input.bfloat16(), grad.bfloat16()
    half = taken(layer, module, input, grad, None)
    full = taken(layer, module, input.float(), grad.float(), None)
    for name, value in half.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, full[name])
    drawn = taken(layer, module, input, grad, Sampler(10**6, 1))
    for name, value in drawn.items():
        # Batch statistics of a draw are taken in bfloat16, which has 8 bits.
        error = (value - full[name]).abs().max()
        assert value.dtype == torch.float32 and error <= 0.02 * full[name].abs().max()


@pytest.mark.parametrize("bias", [True, False])
@CASES
def test_a_gradient_can_be_read_and_written(case: JointCase, bias: bool) -> None:
    module, layer, input, grad = made(case, bias, True)
    has_bias = bias and case.has_bias
    assert layer.gradient(module, has_bias) is None
    module(input).backward(grad)
    names = layer.parameter_names(module)
    assert names == ["weight", *(["bias"] if has_bias else [])]
    grads = [module.get_parameter(name).grad for name in names]
    first = [g.clone() for g in grads]  # type: ignore[union-attr]
    read = layer.gradient(module, has_bias)
    assert read is not None
    units = first[0].numel()
    assert read.weight_OD.shape == (units, 1)
    assert torch.equal(read.weight_OD.squeeze(1), first[0].flatten())
    if has_bias:
        assert read.bias_O is not None and torch.equal(read.bias_O, first[1].flatten())
    else:
        assert read.bias_O is None
    doubled = AffineGradient(*(None if part is None else 2 * part for part in read))  # type: ignore[arg-type]
    layer.write_gradient(module, has_bias, doubled)
    for parameter_grad, before in zip(grads, first, strict=True):
        assert parameter_grad is not None and torch.equal(parameter_grad, 2 * before)
    read.weight_OD.mul_(2)  # a view: written at once
    layer.write_gradient(module, has_bias, read)
    assert torch.equal(grads[0], 4 * first[0])  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="write_gradient"):
        layer.write_gradient(module, has_bias, AffineGradient(read.weight_OD[:-1], read.bias_O))
    other_bias = None if has_bias else torch.zeros(units)
    with pytest.raises(ShapeError, match="write_gradient"):
        layer.write_gradient(module, has_bias, AffineGradient(read.weight_OD, other_bias))
    module.zero_grad()
    with pytest.raises(CaptureError, match="backward"):
        layer.write_gradient(module, has_bias, read)


def test_a_gradient_in_another_memory_format_is_copied_and_written_back() -> None:
    module = nn.LayerNorm((2, 3, 4))
    grads = [torch.randn(4, 3, 2).permute(2, 1, 0) for _ in range(2)]
    module.weight.grad, module.bias.grad = grads
    before = [grad.clone(memory_format=torch.contiguous_format) for grad in grads]
    read = joint_layer(module).gradient(module, True)
    assert read is not None and read.bias_O is not None
    assert torch.equal(read.weight_OD, before[0].reshape(-1, 1))
    read.weight_OD.mul_(2)
    read.bias_O.mul_(3)
    joint_layer(module).write_gradient(module, True, read)
    assert torch.equal(module.weight.grad, 2 * before[0])
    assert torch.equal(module.bias.grad, 3 * before[1])
    assert module.weight.grad.stride() == grads[0].stride()


@pytest.mark.parametrize(
    "module,shape,message",
    [
        (nn.LayerNorm((3, 4)), (3, 4), r"LayerNorm.*\(3, 4\).*unsqueeze"),
        (nn.RMSNorm(4), (4,), r"RMSNorm.*\(4,\).*unsqueeze"),
        (nn.InstanceNorm1d(3, affine=True), (3, 5), r"InstanceNorm1d.*\(3, 5\).*unsqueeze"),
        (nn.InstanceNorm2d(3, affine=True), (3, 5, 5), r"InstanceNorm2d.*\(3, 5, 5\)"),
        (Bias(4), (4,), r"Bias of shape \(4,\).*\(4,\).*samples"),
        (Scale(5, 4), (5, 4), r"Scale of shape \(5, 4\).*\(5, 4\).*samples"),
        (Bias(1, 1, 4), (5, 4), r"Bias of shape \(1, 1, 4\).*samples"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_inputs_without_a_batch_dimension_are_refused(
    module: nn.Module, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(CaptureError, match=message):
        joint_layer(module).keep(module, torch.randn(shape), None)


def test_what_is_refused_and_why() -> None:
    synchronised = nn.SyncBatchNorm(3)
    assert "all ranks" in str(joint_layer(synchronised).refuse(synchronised))
    frozen = nn.LayerNorm(3)
    frozen.weight.requires_grad_(False)
    assert "weight is frozen" in str(joint_layer(frozen).refuse(frozen))


def test_a_bias_frozen_after_the_block_was_made_is_an_error() -> None:
    module = nn.BatchNorm1d(2)
    module(torch.randn(3, 2)).sum().backward()
    module.bias.grad = None
    with pytest.raises(CaptureError, match="frozen"):
        joint_layer(module).gradient(module, True)


def test_a_norm_of_other_make_is_read_by_the_names_that_it_has() -> None:
    class OtherNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.variance_epsilon = 0.2

        def forward(self, x: Tensor) -> Tensor:
            scale = (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
            return self.weight * (x * scale)

    torch.manual_seed(0)
    module, layer = randomised(OtherNorm()), RMSNormIO(eps="variance_epsilon")
    input, grad = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    per_sample = sample_gradients(module, input, grad, "weight")
    statistic = taken(layer, module, input, grad, None)
    zeros = torch.zeros(4, dtype=torch.float64)
    expected = {"ww": per_sample.square().sum(0), "wb": zeros, "bb": zeros}
    assert layer.refuse(module) is None
    assert_statistic(statistic, expected, 5)


def test_bias_and_scale_compute_what_they_say() -> None:
    x = torch.randn(5, 3, 2)
    bias, scale = Bias(), Scale()
    assert bias.weight.shape == scale.weight.shape == (1,)
    assert torch.equal(bias(x), x) and torch.equal(scale(x), x)
    wide = Scale(3, 1, dtype=torch.float64)
    assert wide.weight.dtype == torch.float64 and repr(wide) == "Scale(3, 1)"
    with torch.no_grad():
        bias.weight.fill_(2.0)
        wide.weight.copy_(torch.tensor([[1.0], [2.0], [3.0]]))
    assert torch.equal(bias(x), x + 2)
    assert torch.equal(wide(x)[:, 1], 2 * x[:, 1].double())
