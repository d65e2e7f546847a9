"""`distcurv.register_layer`: what it takes, what it refuses, and the layers found by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import distcurv
from distcurv import layers
from distcurv.errors import ConfigError
from distcurv.layers import LAYERS, LAYERS_BY_NAME, find_layer
from distcurv.layers.linear import LinearIO
from distcurv.layers.norms import LayerNormIO
from distcurv.layers.transposed_linear import TransposedLinearIO


class Turned(nn.Module):
    """A Linear with its weight as [Di, Do], as a user would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3))
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten."""
    monkeypatch.setattr(layers, "LAYERS", dict(LAYERS))


@pytest.mark.parametrize("layer", [TransposedLinearIO, TransposedLinearIO()])
def test_a_registered_type_is_found_and_its_subclasses_are_not(layer: object) -> None:
    class Special(Turned):
        pass

    assert find_layer(Turned()) is None
    distcurv.register_layer(Turned, layer)  # type: ignore[arg-type]
    assert isinstance(find_layer(Turned()), TransposedLinearIO)
    assert find_layer(Special()) is None


def test_a_one_sided_layer_can_be_registered() -> None:
    class MyNorm(nn.LayerNorm):
        pass

    distcurv.register_layer(MyNorm, LayerNormIO)
    assert isinstance(find_layer(MyNorm(3)), LayerNormIO)


@pytest.mark.parametrize("module_type", [Turned(), int, "torch.nn.Linear", None])
def test_what_is_no_class_of_modules_is_refused(module_type: object) -> None:
    with pytest.raises(ConfigError, match=r"register_layer got .* as the module's type"):
        distcurv.register_layer(module_type, LinearIO)  # type: ignore[arg-type]


def test_a_layer_without_a_part_of_its_protocol_is_refused() -> None:
    class NoRows(LinearIO):
        input_rows = property()  # type: ignore[assignment]

    class NotJoint(LinearIO):
        one_sided = "unitwise"

    class WithArguments(LinearIO):
        def __init__(self, width: int) -> None:
            super().__init__()

    with pytest.raises(ConfigError, match=r"lacks input_rows of .*LayerIO"):
        distcurv.register_layer(Turned, NoRows)
    with pytest.raises(ConfigError, match=r"lacks keep, statistic of .*JointIO"):
        distcurv.register_layer(Turned, NotJoint)
    with pytest.raises(ConfigError, match=r"lacks one_sided, .*input_statistic"):
        distcurv.register_layer(Turned, object())  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"cannot make a .*WithArguments.*width.*give an instance"
    ):
        distcurv.register_layer(Turned, WithArguments)
    assert find_layer(Turned()) is None


@pytest.mark.parametrize("module_type", [nn.Linear, Conv1D])
def test_a_second_registration_must_say_that_it_replaces(module_type: type[nn.Module]) -> None:
    class Mine(TransposedLinearIO):
        pass

    with pytest.raises(ConfigError, match=r"is registered already.*replace=True"):
        distcurv.register_layer(module_type, Mine)
    distcurv.register_layer(module_type, Mine, replace=True)
    module = module_type(3, 5)
    assert isinstance(find_layer(module), Mine)


def test_a_layer_by_name_is_that_of_the_very_type() -> None:
    class Subclass(Conv1D):
        pass

    by_name = LAYERS_BY_NAME["transformers.pytorch_utils.Conv1D"]
    assert find_layer(Conv1D(3, 5)) is by_name
    assert find_layer(Subclass(3, 5)) is None


def test_a_transposed_gradient_is_a_view() -> None:
    module, layer = Conv1D(3, 5), TransposedLinearIO()
    module(torch.randn(4, 2, 5)).sum().backward()
    gradient = layer.gradient(module, True)
    assert gradient is not None and gradient.bias_O is not None
    gradient.weight_OD.fill_(7)
    gradient.bias_O.fill_(8)
    assert (module.weight.grad == 7).all() and (module.bias.grad == 8).all()
