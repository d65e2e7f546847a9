"""Statistics and gradients of every registered layer against autograd in float64.

Tolerance: 1e-12 relative to the largest entry, plus 1e-12; float64 sums of < 1000 terms."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from layer_cases import (
    CASES,
    LayerCase,
    grouped_rows,
    input_factor,
    input_rows,
    output_factor,
    output_rows,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from distcurv.curvature.apply import AffineGradient
from distcurv.curvature.row_draw import Sampler
from distcurv.curvature.spec import SideSpec, Tensors
from distcurv.curvature.triangle import unpack_triangle
from distcurv.errors import CaptureError, ShapeError
from distcurv.layers import LAYERS, LAYERS_BY_NAME, find_layer
from distcurv.layers import conv as conv_file
from distcurv.layers.layer import LayerIO
from distcurv.layers.registration import type_name

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


def layer_of(module: nn.Module) -> LayerIO:
    """The registered layer of a module with two sides."""
    layer = find_layer(module)
    assert layer is not None and layer.one_sided is None
    return layer  # type: ignore[return-value]


def test_every_registered_layer_has_cases() -> None:
    """Those with two sides that are made of rows; for the others see the tests beside this one."""
    registered = {type_name(module_type): layer for module_type, layer in LAYERS.items()}
    by_rows = {
        name
        for name, layer in (registered | LAYERS_BY_NAME).items()
        if layer.one_sided is None and not layer.diagonal_sides
    }
    assert {type_name(module_type) for module_type in CASES} == by_rows
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
    layer = layer_of(module)
    assert layer.refuse(module) is None
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
    layer = layer_of(module)
    assert layer.gradient(module, bias) is None
    input = torch.randn(case.input_shape, dtype=torch.float64)
    output = module(input)
    grad_output = torch.randn_like(output)
    output.backward(grad_output)
    gradient = layer.gradient(module, bias)
    assert gradient is not None
    rows_a, rows_g = grouped_rows(case, module, input, bias), output_rows(case, grad_output)
    rows_g = rows_g.unflatten(2, (case.groups, -1))  # each group's outputs see its own inputs
    expected = torch.einsum("nsho,hnsi->hoi", rows_g, rows_a).flatten(0, 1)
    assert_close(gradient.whole(), expected)

    def grad_places() -> dict[str, int]:
        grads = {name: p.grad for name, p in module.named_parameters()}
        return {name: grad.data_ptr() for name, grad in grads.items() if grad is not None}

    places = grad_places()
    doubled = AffineGradient(*(None if part is None else 2 * part for part in gradient))  # type: ignore[arg-type]
    layer.write_gradient(module, bias, doubled)
    again = layer.gradient(module, bias)
    assert again is not None
    assert_close(again.whole(), 2 * expected)
    again.weight_OD.mul_(2)  # written at once where it is a view
    layer.write_gradient(module, bias, again)
    assert places == grad_places()
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


@pytest.mark.parametrize("module_type", list(CASES), ids=lambda kind: kind.__name__)
def test_half_precision_inputs_are_summed_in_float32(module_type: type[nn.Module]) -> None:
    case = CASES[module_type][0]
    module = case.make(True).bfloat16()
    layer = layer_of(module)
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
@pytest.mark.parametrize(
    "module,size,image,positions",
    [  # image: with its border; positions: of the output
        (nn.Conv1d(4, 6, 25, padding=12), (256,), 280, 256),
        (nn.Conv2d(4, 6, 5, padding=2), (16, 16), 400, 256),
        (nn.Conv2d(8, 6, 5, padding=4, dilation=2, groups=2), (16, 16), 2 * 576, 2 * 256),
        (nn.Conv3d(4, 6, 3, padding=1), (6, 7, 6), 8 * 9 * 8, 252),
        (nn.ConvTranspose1d(4, 6, 25, padding=12), (256,), 256, 256),
        (nn.ConvTranspose2d(4, 6, 5, stride=2, padding=2, output_padding=1), (8, 8), 64, 256),
        (nn.ConvTranspose3d(4, 6, 3, stride=2, padding=1), (4, 4, 4), 64, 343),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_convolution_sketch_never_forms_the_patches(
    monkeypatch: pytest.MonkeyPatch,
    module: nn.Module,
    size: tuple[int, ...],
    image: int,
    positions: int,
    weight_sharing: str,
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("unfold was called")

    monkeypatch.setattr(F, "unfold", refuse)
    monkeypatch.setattr(Tensor, "unfold", refuse)
    layer = layer_of(module)
    dim = layer.dims(module, True)[0]
    side = SideSpec(dim, 3, "diagonal")
    channels = module.in_channels
    assert isinstance(channels, int)
    x = torch.randn(2, channels, *size)
    with LargestTensor() as largest:
        layer.input_statistic(
            module, x, side, random_basis(dim, 3), bias=True, weight_sharing=weight_sharing
        )
    padded, projected, patches = 2 * 4 * image, 2 * 3 * positions, 2 * positions * dim
    if weight_sharing == "expand":
        assert largest.numbers >= projected
    assert largest.numbers <= max(padded, 2 * projected) < patches / 4
    with pytest.raises(AssertionError, match="unfold"):
        layer.input_statistic(
            module, x, SideSpec(dim, 3, encoding="dense"), None, bias=True, weight_sharing="expand"
        )


@pytest.mark.parametrize("encoding", ["dense", "sketch"])
@pytest.mark.parametrize("case", [CASES[nn.Conv2d][9], CASES[nn.Conv3d][6]], ids=lambda c: c.label)
def test_convolutions_in_chunks_equal_one_piece(
    monkeypatch: pytest.MonkeyPatch, case: LayerCase, encoding: str
) -> None:
    torch.manual_seed(0)
    module = case.make(True)
    layer = layer_of(module)
    input = torch.randn(case.input_shape, dtype=torch.float64)
    side = SideSpec(layer.dims(module, True)[0], 2, "diagonal", encoding)
    basis = random_basis(side.dim, 2)

    def statistic() -> Tensors:
        return layer.input_statistic(module, input, side, basis, bias=True, weight_sharing="expand")

    whole = statistic()
    monkeypatch.setattr(conv_file, "NUMBERS_PER_CHUNK", 1)
    for name, value in statistic().items():
        assert_close(value, whole[name])


@pytest.mark.parametrize("drawn", [True, False])
def test_another_output_padding_than_the_modules_is_an_error(drawn: bool) -> None:
    """`output_size` changes the positions, and the input does not say so."""
    module = nn.ConvTranspose2d(2, 3, 3, stride=2)
    layer = layer_of(module)
    x = torch.randn(2, 2, 4, 5)

    def read(grad: Tensor) -> None:
        if drawn:
            layer.output_rows(module, grad, Sampler(4, 0), weight_sharing="expand")
        else:
            side = SideSpec(3, 1, encoding="dense")
            layer.output_statistic(module, grad, side, None, weight_sharing="expand")

    read(torch.ones_like(module(x)))
    read(torch.ones_like(module(x, output_size=(9, 11))))  # what it would be anyway
    with pytest.raises(CaptureError, match=r"output_padding=\(0, 0\).*output_size"):
        read(torch.ones_like(module(x, output_size=(9, 12))))


@dataclass(frozen=True)
class Geometry:
    """What a function call says of a convolution: no parameters."""

    kernel_size: tuple[int, ...] = (2,)
    stride: tuple[int, ...] = (2,)
    padding: tuple[int, ...] = (1,)
    dilation: tuple[int, ...] = (3,)
    groups: int = 2
    padding_mode: str = "zeros"


def test_a_stand_in_without_parameters_gives_the_same_statistics() -> None:
    torch.manual_seed(0)
    module = nn.Conv1d(4, 2, 2, stride=2, padding=1, dilation=3, groups=2)
    layer, x = layer_of(module), torch.randn(3, 4, 11)
    side, basis = SideSpec(5, 2), random_basis(5, 2)
    for how in (module, Geometry()):
        for sharing in ("expand", "reduce"):
            statistic = layer.input_statistic(
                how, x, side, basis, bias=True, weight_sharing=sharing
            )
            expected = layer.input_statistic(
                module, x, side, basis, bias=True, weight_sharing=sharing
            )
            assert all(torch.equal(value, expected[name]) for name, value in statistic.items())
            rows = layer.input_rows(how, x, Sampler(3, 5), weight_sharing=sharing)
            assert torch.equal(
                rows.rows_nd,
                layer.input_rows(module, x, Sampler(3, 5), weight_sharing=sharing).rows_nd,
            )


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
    with pytest.raises(CaptureError, match=r"ConvTranspose1d.*\(2, 7\).*\[N, C, L\]"):
        LAYERS[nn.ConvTranspose1d].input_statistic(
            nn.ConvTranspose1d(2, 3, 1), torch.randn(2, 7), side, None, bias=True,
            weight_sharing="expand",
        )  # fmt: skip


def test_a_sketch_without_a_fitting_basis_is_refused() -> None:
    module, layer = nn.Linear(5, 3), LAYERS[nn.Linear]
    for basis, error in ((None, CaptureError), (torch.zeros(5, 2), ShapeError)):
        with pytest.raises(error, match="basis"):
            layer.input_statistic(
                module, torch.randn(4, 5), SideSpec(6, 2), basis, bias=True, weight_sharing="expand"
            )


def test_what_is_refused_and_why() -> None:
    conv, linear = LAYERS[nn.Conv2d], LAYERS[nn.Linear]
    assert conv.refuse(nn.Conv2d(4, 4, 3, groups=2, dilation=2)) is None
    for layer, lazy in ((conv, nn.LazyConv2d(4, 3)), (linear, nn.LazyLinear(2))):
        assert "lazy" in str(layer.refuse(lazy))
        lazy(torch.randn(2, 3, 5, 5))
        assert find_layer(lazy) is layer and layer.refuse(lazy) is None
    for lazy in (nn.LazyConv1d(4, 3), nn.LazyConvTranspose3d(4, 3), nn.LazyLinear(2)):
        assert find_layer(lazy) is None
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
