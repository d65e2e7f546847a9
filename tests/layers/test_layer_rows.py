"""Drawn rows of every registered layer against the oracle that knows nothing of drawing.

Unbiasedness is exact: the average over all values of the random number is the statistic of all
rows, to rounding (1e-12 of its largest entry in float64).
"""

from __future__ import annotations

import pytest
import torch
from layer_cases import CASES, LayerCase, input_factor, input_rows, output_factor, output_rows
from test_layer_statistics import assert_close, assert_statistic, layer_of, random_basis
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distcurv.curvature.row_draw import Sampler
from distcurv.curvature.spec import SideSpec, Tensors
from distcurv.layers.affine_rows import encode_affine_rows
from distcurv.layers.layer import LayerIO, Rows

ALL = [case for cases in CASES.values() for case in cases]
BIG = 10**6


def statistic_of(rows: Rows, side: SideSpec, basis: Tensor, bias: bool) -> Tensors:
    statistic = encode_affine_rows(side, rows.rows_nd, basis, bias, float(rows.weight))
    return statistic | {"count": torch.tensor(float(rows.count))}


def made(case: LayerCase, bias: bool) -> tuple[nn.Module, LayerIO, Tensor, Tensor]:
    torch.manual_seed(0)
    module = case.make(bias)
    layer = layer_of(module)
    input = torch.randn(case.input_shape, dtype=torch.float64)
    return module, layer, input, torch.randn_like(module(input))


@pytest.mark.parametrize(
    "encoding,tail", [("sketch", "diagonal"), ("sketch", "isotropic"), ("dense", "none")]
)
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.label)
def test_enough_rows_give_the_statistic_of_all(
    case: LayerCase, bias: bool, weight_sharing: str, encoding: str, tail: str
) -> None:
    module, layer, input, grad = made(case, bias)
    dims = layer.dims(module, bias)
    sides = [SideSpec(dim, 2, tail, encoding) for dim in dims]
    bases = [random_basis(dim, 2) for dim in dims]
    sampler = Sampler(BIG, 77)
    rows = layer.input_rows(module, input, sampler, weight_sharing=weight_sharing)
    factor, count = input_factor(input_rows(case, module, input, bias), weight_sharing)
    assert_statistic(
        statistic_of(rows, sides[0], bases[0], bias), sides[0], bases[0], factor, count
    )
    rows = layer.output_rows(module, grad, sampler, weight_sharing=weight_sharing)
    factor, count = output_factor(output_rows(case, grad), weight_sharing)
    assert_statistic(
        statistic_of(rows, sides[1], bases[1], False), sides[1], bases[1], factor, count
    )


@pytest.mark.parametrize("layout", ["contiguous", "other"])
@pytest.mark.parametrize("max_rows", [1, 3, 9])
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.label)
def test_the_average_over_all_draws_is_the_statistic_of_all(
    case: LayerCase, weight_sharing: str, max_rows: int, layout: str
) -> None:
    module, layer, input, grad = made(case, True)
    expected = [
        input_factor(input_rows(case, module, input, True), weight_sharing),
        output_factor(output_rows(case, grad), weight_sharing),
    ]
    if layout == "other":  # neither lies as its shape says; images: channels last
        input, grad = (t.transpose(0, -1).contiguous().transpose(0, -1) for t in (input, grad))
        if input.dim() == 4:
            input, grad = (t.contiguous(memory_format=torch.channels_last) for t in (input, grad))
    dims = layer.dims(module, True)
    sides = [SideSpec(dim, 2, "diagonal") for dim in dims]
    bases = [random_basis(dim, 2) for dim in dims]
    totals: list[Tensors] = [{}, {}]
    draws = layer.input_rows(
        module, input, Sampler(max_rows, 0), weight_sharing=weight_sharing
    ).weight
    for number in range(draws):
        sampler = Sampler(max_rows, number)
        read = [
            layer.input_rows(module, input, sampler, weight_sharing=weight_sharing),
            layer.output_rows(module, grad, sampler, weight_sharing=weight_sharing),
        ]
        assert [rows.weight for rows in read] == [draws, draws]  # the same positions of both
        for total, rows, side, basis, bias, groups in zip(
            totals, read, sides, bases, (True, False), (case.groups, 1), strict=True
        ):
            assert groups <= rows.rows_nd.shape[0] <= groups * max_rows
            for name, value in statistic_of(rows, side, basis, bias).items():
                total[name] = total.get(name, torch.zeros_like(value)) + value
    for total, basis, (factor, count) in zip(totals, bases, expected, strict=True):
        mean = {name: value / draws for name, value in total.items()}
        assert_close(mean["Y"], factor @ basis)
        assert_close(mean["diag"], factor.diagonal())
        assert_close(mean["trace"], factor.trace())
        assert mean["count"].item() == count


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("max_rows", [2, BIG])
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.label)
def test_rows_are_copies(case: LayerCase, max_rows: int, weight_sharing: str) -> None:
    """What is read in the forward must not change with the tensor it was read from."""
    module, layer, input, grad = made(case, True)
    sampler = Sampler(max_rows, 3)
    for read, tensor in ((layer.input_rows, input), (layer.output_rows, grad)):
        rows = read(module, tensor, sampler, weight_sharing=weight_sharing)
        before = rows.rows_nd.clone()
        tensor.fill_(torch.nan)
        assert torch.equal(rows.rows_nd, before)


class LargestMemory(TorchDispatchMode):
    """Remembers the numbers of the largest memory that any operation but a view took."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result._is_view():
            places = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
            if result.untyped_storage().data_ptr() not in places:
                size = result.untyped_storage().nbytes() // result.element_size()
                self.numbers = max(self.numbers, size)
        return result


def test_only_drawn_patches_of_drawn_images_are_formed() -> None:
    module = nn.Conv2d(4, 6, 5, padding=2)
    layer = layer_of(module)
    x = torch.randn(64, 4, 16, 16)
    with LargestMemory() as largest:
        rows = layer.input_rows(module, x, Sampler(64, 1), weight_sharing="expand")
    assert rows.rows_nd.shape == (64, 100)
    # What has memory of its own: the drawn images with their border, and the drawn patches.
    assert largest.numbers == max(8 * 4 * 20 * 20, 64 * 100)


@pytest.mark.parametrize("module_type", list(CASES), ids=lambda kind: kind.__name__)
def test_half_precision_rows_are_summed_in_float32(module_type: type[nn.Module]) -> None:
    case = CASES[module_type][-1]
    module = case.make(True).bfloat16()
    layer = layer_of(module)
    input = torch.randn(case.input_shape, dtype=torch.bfloat16)
    dim = layer.dims(module, True)[0]
    side, basis = SideSpec(dim, 2), random_basis(dim, 2)
    sampler = Sampler(5, 2)
    half = layer.input_rows(module, input, sampler, weight_sharing="expand")
    full = layer.input_rows(module, input.float(), sampler, weight_sharing="expand")
    for name, value in statistic_of(half, side, basis, True).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, statistic_of(full, side, basis, True)[name])
