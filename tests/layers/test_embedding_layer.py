"""nn.Embedding against unit vectors and autograd in float64.

Tolerance: 1e-12 relative to the largest entry, plus 1e-12; counts are exact."""

from __future__ import annotations

import pytest
import torch
from test_layer_statistics import assert_close, assert_statistic, random_basis
from torch import Tensor, nn
from torch.nn import functional as F

from distcurv.curvature.apply import AffineGradient
from distcurv.curvature.row_draw import Sampler
from distcurv.curvature.spec import SideSpec
from distcurv.errors import CaptureError, ShapeError
from distcurv.layers import LAYERS
from distcurv.layers.affine_rows import encode_affine_rows
from distcurv.layers.embedding import EmbeddingIO

IDS, FEATURES = 7, 3
SHAPES = pytest.mark.parametrize("shape", [(6,), (4, 5), (3, 2, 4)], ids=str)
PADDING = pytest.mark.parametrize("padding", [None, 2, -1])


def made(padding: int | None, shape: tuple[int, ...]) -> tuple[nn.Embedding, Tensor, Tensor]:
    torch.manual_seed(0)
    module = nn.Embedding(IDS, FEATURES, padding_idx=padding, dtype=torch.float64)
    ids = torch.randint(IDS, shape)
    ids.view(-1)[:3] = torch.tensor([2, IDS - 1, 2])  # every padding id occurs
    return module, ids, torch.randn(*shape, FEATURES, dtype=torch.float64)


def layer() -> EmbeddingIO:
    registered = LAYERS[nn.Embedding]
    assert isinstance(registered, EmbeddingIO)
    return registered


def masked(module: nn.Embedding, ids: Tensor, grad: Tensor) -> Tensor:
    counted = layer().counted_positions(module, ids)
    return grad if counted is None else grad * counted.unsqueeze(-1)


@PADDING
@SHAPES
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_side_a_is_the_diagonal_of_the_unit_vectors(
    shape: tuple[int, ...], padding: int | None, weight_sharing: str
) -> None:
    module, ids, _ = made(padding, shape)
    assert layer().diagonal_sides == {"A"} and layer().refuse(module) is None
    assert layer().dims(module, False) == (IDS, FEATURES)
    side = SideSpec(IDS, 0, "diagonal", "diagonal")
    statistic = layer().input_statistic(
        module, ids, side, None, bias=False, weight_sharing=weight_sharing
    )
    units = F.one_hot(ids.flatten(), IDS).float()
    if module.padding_idx is not None:
        units[:, module.padding_idx] = 0
    assert set(statistic) == {"diag", "count"}
    assert torch.equal(torch.diag(statistic["diag"]), units.T @ units)
    assert statistic["count"].item() == ids.numel()


@PADDING
@SHAPES
@pytest.mark.parametrize("encoding,tail", [("sketch", "diagonal"), ("dense", "none")])
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_side_g_is_that_of_the_output_gradients(
    shape: tuple[int, ...], padding: int | None, encoding: str, tail: str, weight_sharing: str
) -> None:
    module, ids, grad = made(padding, shape)
    grad = masked(module, ids, grad)
    side, basis = SideSpec(FEATURES, 2, tail, encoding), random_basis(FEATURES, 2)
    factor = torch.zeros(FEATURES, FEATURES, dtype=torch.float64)
    for id, row in zip(ids.flatten().tolist(), grad.reshape(-1, FEATURES), strict=True):
        if id != module.padding_idx:
            factor += torch.outer(row, row)
    statistic = layer().output_statistic(module, grad, side, basis, weight_sharing=weight_sharing)
    assert_statistic(statistic, side, basis, factor, shape[0])

    # The average over all draws; padding rows are drawn like any others, as zeros.
    for max_rows in (1, 5, 10**6):
        mean = torch.zeros(FEATURES, FEATURES, dtype=torch.float64)
        sides = SideSpec(FEATURES, FEATURES, "none", "sketch")
        identity = torch.eye(FEATURES, dtype=torch.float64)
        draws = (
            layer()
            .output_rows(module, grad, Sampler(max_rows, 0), weight_sharing=weight_sharing)
            .weight
        )
        for number in range(draws):
            sampler = Sampler(max_rows, number)
            rows = layer().output_rows(module, grad, sampler, weight_sharing=weight_sharing)
            assert rows.weight == draws and rows.count == shape[0]
            assert len(rows.rows_nd) <= max_rows
            sketch = encode_affine_rows(sides, rows.rows_nd, identity, False, float(rows.weight))
            mean += sketch["Y"] / draws
        assert_close(mean, factor)


@PADDING
@SHAPES
def test_the_gradient_is_the_sum_of_outer_products_and_can_be_written(
    shape: tuple[int, ...], padding: int | None
) -> None:
    module, ids, grad = made(padding, shape)
    assert layer().gradient(module, False) is None
    module(ids).backward(grad)
    read = layer().gradient(module, False)
    assert read is not None and read.bias_O is None
    units = F.one_hot(ids.flatten(), IDS).double()
    rows = masked(module, ids, grad).reshape(-1, FEATURES)
    expected = rows.T @ units
    assert_close(read.weight_OD, expected)
    assert module.weight.grad is not None
    assert read.weight_OD.data_ptr() == module.weight.grad.data_ptr()

    layer().write_gradient(module, False, AffineGradient(2 * read.weight_OD, None))
    assert_close(module.weight.grad, 2 * expected.T)
    read.weight_OD.mul_(2)  # a view: written at once
    layer().write_gradient(module, False, read)
    assert_close(module.weight.grad, 4 * expected.T)
    module.weight.grad = module.weight.grad.T.contiguous().T  # another memory format
    contiguous = AffineGradient(expected.contiguous(), None)
    layer().write_gradient(module, False, contiguous)
    assert_close(module.weight.grad, expected.T)
    for wrong in (
        AffineGradient(expected.T, None),
        AffineGradient(expected, torch.zeros(FEATURES)),
    ):
        with pytest.raises(ShapeError, match="write_gradient"):
            layer().write_gradient(module, False, wrong)
    module.zero_grad()
    with pytest.raises(CaptureError, match="backward"):
        layer().write_gradient(module, False, contiguous)


def test_half_precision_gradients_are_summed_in_float32() -> None:
    module, _, grad = made(None, (4, 5))
    side = SideSpec(FEATURES, 2)
    arguments = (side, random_basis(FEATURES, 2).float())
    half = layer().output_statistic(module, grad.bfloat16(), *arguments, weight_sharing="expand")
    full = layer().output_statistic(
        module, grad.bfloat16().float(), *arguments, weight_sharing="expand"
    )
    for name, value in half.items():
        assert value.dtype == torch.float32 and torch.equal(value, full[name])


def test_what_is_refused_and_why() -> None:
    for refused in (
        nn.Embedding(4, 2, max_norm=1.0),
        nn.Embedding(4, 2, sparse=True),
        nn.Embedding(4, 2, scale_grad_by_freq=True),
    ):
        reason = str(layer().refuse(refused))
        assert any(word in reason for word in ("max_norm=1.0", "sparse", "scale_grad_by_freq"))
    frozen = nn.Embedding(4, 2).requires_grad_(False)
    assert "frozen" in str(layer().refuse(frozen))
    assert nn.EmbeddingBag not in LAYERS


def test_a_single_id_and_rows_of_side_a_are_refused() -> None:
    module, side = nn.Embedding(4, 2), SideSpec(4, 0, "diagonal", "diagonal")
    with pytest.raises(CaptureError, match="batch dimension"):
        layer().input_statistic(
            module, torch.tensor(1), side, None, bias=False, weight_sharing="expand"
        )
    with pytest.raises(CaptureError, match="batch dimension"):
        layer().output_statistic(
            module, torch.randn(2), SideSpec(2, 1), None, weight_sharing="expand"
        )
    with pytest.raises(CaptureError, match="input_statistic"):
        layer().input_rows(module, torch.tensor([1, 2]), Sampler(1, 0), weight_sharing="expand")
