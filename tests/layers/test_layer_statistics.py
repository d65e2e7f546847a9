"""Statistics and gradients of every registered layer against autograd in float64.

Tolerance: 1e-12 relative to the largest entry, plus 1e-12; float64 sums of < 1000 terms."""

from __future__ import annotations

import pytest
import torch
from layer_cases import CASES, LayerCase, input_factor, input_rows, output_factor, output_rows
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from distcurv.curvature.apply import AffineGradient
from distcurv.curvature.spec import SideSpec, Tensors
from distcurv.curvature.triangle import unpack_triangle
from distcurv.errors import CaptureError, ShapeError
from distcurv.layers import LAYERS, find_layer
from distcurv.layers import conv2d as conv2d_file

ALL = [case for cases in CASES.values() for case in cases]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max()
    assert error <= 1e-12 * (1 + expected.abs().max()), f"error {error:.2e}"


def assert_statistic(
    statistic: Tensors, side: SideSpec, basis: Tensor, factor: Tensor, count: int
) -> None:
    assert statistic["count"].item() == count
    if side.encoding == "dense":
        assert set(statistic) == {"packed", "count"}
        assert_close(unpack_triangle(statistic["packed"], side.dim), factor)
        return
    names = {"Y", "trace", "count"} | ({"diag"} if side.tail == "diagonal" else set())
    assert set(statistic) == names
    assert_close(statistic["Y"], factor @ basis)
    assert_close(statistic["trace"], factor.trace())
    if side.tail == "diagonal":
        assert_close(statistic["diag"], factor.diagonal())


def random_basis(dim: int, rank: int) -> Tensor:
    return torch.linalg.qr(torch.randn(dim, rank, dtype=torch.float64))[0]


def test_every_registered_layer_has_cases() -> None:
    assert set(CASES) == set(LAYERS)
    for module_type, cases in CASES.items():
        assert cases
        for case in cases:
            assert type(case.make(True)) is module_type


@pytest.mark.parametrize(
    "encoding,tail,rank",
    [("sketch", "diagonal", 2), ("sketch", "isotropic", "full"), ("dense", "none", 1)],
)
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.label)
def test_statistics_equal_autograd(
    case: LayerCase, bias: bool, weight_sharing: str, encoding: str, tail: str, rank: int | str
) -> None:
    torch.manual_seed(0)
    module = case.make(bias)
    layer = find_layer(module)
    assert layer is not None and layer.refuse(module) is None
    input = torch.randn(case.input_shape, dtype=torch.float64)
    grad_output = torch.randn_like(module(input))
    dims = layer.dims(module, bias)

    rows = input_rows(case, module, input, bias)
    side = SideSpec(dims[0], dims[0] if rank == "full" else int(rank), tail, encoding)
    basis = random_basis(side.dim, side.rank)
    statistic = layer.input_statistic(
        module, input, side, basis, bias=bias, weight_sharing=weight_sharing
    )
    assert_statistic(statistic, side, basis, *input_factor(rows, weight_sharing))

    rows = output_rows(case, grad_output)
    side = SideSpec(dims[1], dims[1] if rank == "full" else int(rank), tail, encoding)
    basis = random_basis(side.dim, side.rank)
    statistic = layer.output_statistic(
        module, grad_output, side, basis, weight_sharing=weight_sharing
    )
    assert_statistic(statistic, side, basis, *output_factor(rows, weight_sharing))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.label)
def test_gradient_is_the_sum_of_outer_products_and_can_be_written(
    case: LayerCase, bias: bool
) -> None:
    """The columns of the gradient matrix are the coordinates of side A, its rows those of G."""
    torch.manual_seed(1)
    module = case.make(bias)
    layer = find_layer(module)
    assert layer is not None
    assert layer.gradient(module, bias) is None
    input = torch.randn(case.input_shape, dtype=torch.float64)
    output = module(input)
    grad_output = torch.randn_like(output)
    output.backward(grad_output)
    gradient = layer.gradient(module, bias)
    assert gradient is not None
    rows_a, rows_g = input_rows(case, module, input, bias), output_rows(case, grad_output)
    expected = torch.einsum("nso,nsi->oi", rows_g, rows_a)
    assert_close(gradient.whole(), expected)

    places = {name: p.grad.data_ptr() for name, p in module.named_parameters()}  # type: ignore[union-attr]
    doubled = AffineGradient(*(None if part is None else 2 * part for part in gradient))  # type: ignore[arg-type]
    layer.write_gradient(module, bias, doubled)
    again = layer.gradient(module, bias)
    assert again is not None
    assert_close(again.whole(), 2 * expected)
    again.weight_OD.mul_(2)  # a view: written at once
    layer.write_gradient(module, bias, again)
    assert places == {name: p.grad.data_ptr() for name, p in module.named_parameters()}  # type: ignore[union-attr]
    module.weight.grad = module.weight.grad / 4
    last = layer.gradient(module, bias)
    assert last is not None
    assert_close(last.weight_OD, expected[:, : last.weight_OD.shape[1]])
    with pytest.raises(ShapeError, match="write_gradient"):
        layer.write_gradient(module, bias, AffineGradient(last.weight_OD[:, :-1], last.bias_O))
    wrong_bias = None if bias else torch.zeros(last.weight_OD.shape[0])
    with pytest.raises(ShapeError, match="with a bias" if bias else "without a bias"):
        layer.write_gradient(module, bias, AffineGradient(last.weight_OD, wrong_bias))


def test_a_gradient_in_another_memory_format_is_copied_and_written_back() -> None:
    conv = nn.Conv2d(3, 4, 2)
    torch.manual_seed(0)
    grad = torch.randn_like(conv.weight)
    conv.weight.grad = grad.clone(memory_format=torch.channels_last)
    layer = LAYERS[nn.Conv2d]
    gradient = layer.gradient(conv, False)
    assert gradient is not None
    assert torch.equal(gradient.weight_OD, grad.flatten(1))
    gradient.weight_OD.mul_(2)
    layer.write_gradient(conv, False, gradient)
    assert conv.weight.grad.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(conv.weight.grad, 2 * grad)


@pytest.mark.parametrize("module_type", list(LAYERS), ids=lambda kind: kind.__name__)
def test_half_precision_inputs_are_summed_in_float32(module_type: type[nn.Module]) -> None:
    case = CASES[module_type][0]
    module = case.make(True).bfloat16()
    layer = LAYERS[module_type]
    input = torch.randn(case.input_shape, dtype=torch.bfloat16)
    dims = layer.dims(module, True)
    side = SideSpec(dims[0], 1)
    basis = random_basis(dims[0], 1)
    arguments = (side, basis.float())
    half = layer.input_statistic(module, input, *arguments, bias=True, weight_sharing="expand")
    full = layer.input_statistic(
        module, input.float(), *arguments, bias=True, weight_sharing="expand"
    )
    for name, value in half.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, full[name])


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_a_convolution_sketch_never_forms_the_patches(
    monkeypatch: pytest.MonkeyPatch, weight_sharing: str
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("unfold was called")

    monkeypatch.setattr(F, "unfold", refuse)
    monkeypatch.setattr(Tensor, "unfold", refuse)
    module = nn.Conv2d(4, 6, 5, padding=2)
    layer = LAYERS[nn.Conv2d]
    side = SideSpec(101, 3, "diagonal")
    x = torch.randn(2, 4, 16, 16)
    with LargestTensor() as largest:
        layer.input_statistic(
            module, x, side, random_basis(101, 3), bias=True, weight_sharing=weight_sharing
        )
    padded, projected, patches = 2 * 4 * 20 * 20, 2 * 3 * 256, 2 * 256 * 101
    assert max(padded, projected) <= largest.numbers < patches / 8
    with pytest.raises(AssertionError, match="unfold"):
        layer.input_statistic(
            module, x, SideSpec(101, 3, encoding="dense"), None, bias=True, weight_sharing="expand"
        )


def test_dense_convolutions_in_chunks_equal_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[nn.Conv2d][3]
    module, layer = case.make(True), LAYERS[nn.Conv2d]
    input = torch.randn(case.input_shape, dtype=torch.float64)
    side = SideSpec(19, 1, encoding="dense")

    def packed() -> Tensor:
        return layer.input_statistic(module, input, side, None, bias=True, weight_sharing="expand")[
            "packed"
        ]

    whole = packed()
    monkeypatch.setattr(conv2d_file, "PATCH_NUMBERS_PER_CHUNK", 1)
    assert_close(packed(), whole)


def test_inputs_without_a_batch_dimension_are_refused() -> None:
    side = SideSpec(6, 1)
    with pytest.raises(CaptureError, match=r"Linear.*\(5,\).*unsqueeze"):
        LAYERS[nn.Linear].input_statistic(
            nn.Linear(5, 3), torch.randn(5), side, None, bias=True, weight_sharing="expand"
        )
    with pytest.raises(CaptureError, match=r"Conv2d.*\(2, 7, 6\).*unsqueeze"):
        LAYERS[nn.Conv2d].input_statistic(
            nn.Conv2d(2, 3, 1), torch.randn(2, 7, 6), side, None, bias=True, weight_sharing="expand"
        )


def test_a_sketch_without_a_fitting_basis_is_refused() -> None:
    module, layer = nn.Linear(5, 3), LAYERS[nn.Linear]
    for basis, error in ((None, CaptureError), (torch.zeros(5, 2), ShapeError)):
        with pytest.raises(error, match="basis"):
            layer.input_statistic(
                module, torch.randn(4, 5), SideSpec(6, 2), basis, bias=True, weight_sharing="expand"
            )


def test_what_is_refused_and_why() -> None:
    conv, linear = LAYERS[nn.Conv2d], LAYERS[nn.Linear]
    assert "groups=2" in str(conv.refuse(nn.Conv2d(4, 4, 3, groups=2)))
    assert "dilation=(2, 2)" in str(conv.refuse(nn.Conv2d(4, 4, 3, dilation=2)))
    frozen = nn.Linear(2, 2)
    frozen.weight.requires_grad_(False)
    assert "frozen" in str(linear.refuse(frozen))
    bias_frozen = nn.Linear(2, 2)
    assert bias_frozen.bias is not None
    bias_frozen.bias.requires_grad_(False)
    assert linear.refuse(bias_frozen) is None
    assert not linear.trains_bias(bias_frozen)
    assert linear.trains_bias(nn.Linear(2, 2))
    assert not linear.trains_bias(nn.Linear(2, 2, bias=False))


def test_subclasses_and_parametrised_modules_are_not_taken_for_their_base() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    assert find_layer(Doubled(2, 2)) is None
    assert find_layer(nn.MultiheadAttention(4, 2).out_proj) is None
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    assert find_layer(normed) is None


def test_a_bias_frozen_after_the_block_was_made_is_an_error() -> None:
    module = nn.Linear(2, 2)
    module(torch.randn(3, 2)).sum().backward()
    assert module.bias is not None
    module.bias.grad = None
    with pytest.raises(CaptureError, match="frozen"):
        LAYERS[nn.Linear].gradient(module, True)
