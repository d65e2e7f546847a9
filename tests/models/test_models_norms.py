"""Normalisations of the transformers library against per-sample gradients by autograd.

Tolerance: 1e-5 relative, as some of them compute in float32 whatever their input is."""

from __future__ import annotations

import importlib

import pytest
import torch
from model_zoo import without_torchvision
from torch import Tensor, nn

from distcurv.curvature.row_draw import Sampler
from distcurv.layers import LAYERS_BY_NAME, find_layer

UNITS = 6
ONE_SIDED = [name for name, layer in LAYERS_BY_NAME.items() if layer.one_sided is not None]


def made(qualified_name: str, **settings: object) -> nn.Module:
    home, _, name = qualified_name.rpartition(".")
    with without_torchvision():
        module: nn.Module = vars(importlib.import_module(home))[name](UNITS, **settings)
    for parameter in module.parameters():
        parameter.data.uniform_(0.5, 1.5)
    return module.double()


def per_sample(module: nn.Module, input: Tensor, grad: Tensor, name: str) -> Tensor:
    """[N, U]."""
    rows = []
    for n in range(len(input)):
        module.zero_grad()
        module(input[n : n + 1]).backward(grad[n : n + 1])
        gradient = module.get_parameter(name).grad
        assert gradient is not None
        rows.append(gradient.clone())
    return torch.stack(rows)


def check(module: nn.Module, input: Tensor) -> None:
    layer = find_layer(module)
    assert layer is not None and layer.one_sided == "unitwise" and layer.refuse(module) is None
    grad = torch.randn_like(module(input))
    w = per_sample(module, input, grad, "weight")
    bias = layer.trains_bias(module)
    b = per_sample(module, input, grad, "bias") if bias else torch.zeros_like(w)
    expected = {"ww": w * w, "wb": w * b, "bb": b * b}
    for sampler in (None, Sampler(10**6, 3)):
        kept = layer.keep(module, input, sampler)  # type: ignore[union-attr]
        statistic = layer.statistic(module, kept, grad, bias=bias)  # type: ignore[union-attr]
        assert statistic.pop("count").item() == len(input)
        assert set(statistic) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(statistic[name], value.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ONE_SIDED)
@pytest.mark.parametrize("shape", [(5, UNITS), (4, 3, UNITS)])
def test_statistics_of_features(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    # Small inputs, so that a wrong eps is seen.
    check(made(name, eps=0.01), 0.1 * torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_statistics_of_images(data_format: str) -> None:
    torch.manual_seed(0)
    (name,) = [name for name in ONE_SIDED if name.endswith("ConvNextLayerNorm")]
    module = made(name, eps=0.01, data_format=data_format)
    shape = (4, UNITS, 2, 3) if data_format == "channels_first" else (4, 2, 3, UNITS)
    check(module, 0.1 * torch.randn(shape, dtype=torch.float64))
