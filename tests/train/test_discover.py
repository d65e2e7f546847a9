"""Which modules become blocks, and the reason for every other trainable one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distcurv.errors import ConfigError
from distcurv.train.discover import find_layer_blocks


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.body = nn.ModuleDict(
            {"conv": nn.Conv2d(2, 2, 3), "grouped": nn.Conv2d(2, 2, 3, groups=2)}
        )
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 5)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.frozen_weight = nn.Linear(4, 4)
        self.frozen_weight.weight.requires_grad_(False)
        self.scale = nn.Parameter(self.head.weight.new_ones(()))
        self.again = self.head

    def forward(self, x: Tensor) -> Tensor:
        return x


EVERYTHING = {
    "scale": "gradient",
    "embed": "module",
    "body.conv": "module",
    "body.grouped": "module",
    "norm": "module",
    "attention.q_proj": "calls",
    "attention.k_proj": "calls",
    "attention.v_proj": "calls",
    "attention.out_proj": "calls",
    "head": "module",
    "frozen_weight.bias": "module",
}


def split(model: nn.Module, *ignore: object) -> tuple[dict[str, str], dict[str, str]]:
    found, uncovered = find_layer_blocks(model, ignore)  # type: ignore[arg-type]
    return {layer.name: layer.source for layer in found}, dict(uncovered)


def test_every_trainable_parameter_is_in_exactly_one_block() -> None:
    model = Zoo()
    found, uncovered = find_layer_blocks(model)
    assert {layer.name: layer.source for layer in found} == EVERYTHING
    assert not uncovered
    numbers: dict[int, int] = {}
    for layer in found:
        for name in layer.layer.parameter_names(layer.module):
            parameter = layer.module.get_parameter(name)
            rows = layer.layer.rows
            share = 1.0 if rows is None else (rows[1] - rows[0]) / len(parameter)
            numbers[id(parameter)] = numbers.get(id(parameter), 0) + round(
                share * parameter.numel()
            )
    trained = [p for p in model.parameters() if p.requires_grad]
    assert numbers == {id(p): p.numel() for p in trained}


def test_what_cannot_be_a_block_is_named_with_a_reason() -> None:
    model = nn.ModuleDict(
        {
            "limited": nn.Embedding(5, 4, max_norm=1.0),
            "lazy": nn.LazyLinear(3),
            "complex": nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.complex64))]),
        }
    )
    found, uncovered = split(model)
    assert found == {}
    assert "max_norm" in uncovered["limited"]
    assert "lazy" in uncovered["lazy.weight"]
    assert "complex" in uncovered["complex.0"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
def test_a_torchscript_module_is_named_with_a_reason() -> None:
    scripted = torch.jit.script(nn.Linear(3, 2))
    found, uncovered = split(nn.ModuleDict({"own": nn.Linear(3, 2), "scripted": scripted}))
    assert set(found) == {"own"}
    assert "TorchScript" in uncovered["scripted"]


def test_a_shared_weight_is_one_block_of_the_module_with_outputs_and_inputs() -> None:
    model = Zoo()
    model.head.weight = nn.Parameter(torch.zeros(5, 4))
    model.embed.weight = model.head.weight
    found, uncovered = find_layer_blocks(model)
    assert not uncovered
    head = next(layer for layer in found if layer.name == "head")
    assert head.tied == (model.embed,)
    assert "embed" not in {layer.name for layer in found}
    assert "head.bias" in {layer.name for layer in found}


def test_ignored_by_instance_class_name_and_container() -> None:
    model = Zoo()

    def without(*ignore: object) -> set[str]:
        found, uncovered = split(model, *ignore)
        assert set(uncovered.values()) == {"ignored by ignore_modules"}
        return set(EVERYTHING) - set(found)

    assert without(model.head) == {"head"}
    assert without(nn.Conv2d) == {"body.conv", "body.grouped"}
    assert without("conv") == {"body.conv"}
    assert without(model.body) == {"body.conv", "body.grouped"}
    assert without(model.body, "head", nn.LayerNorm) == {
        "body.conv",
        "body.grouped",
        "head",
        "norm",
    }


def test_bad_ignore_modules_are_refused() -> None:
    for bad in (3, dict, ""):
        with pytest.raises(ConfigError, match="ignore_modules"):
            split(Zoo(), bad)
    with pytest.raises(ConfigError, match="give a list"):
        find_layer_blocks(Zoo(), "head")


def test_a_model_that_is_one_layer_has_a_name() -> None:
    assert split(nn.Linear(2, 2)) == ({"Linear": "module"}, {})
