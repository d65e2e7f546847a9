"""Which modules become blocks, and the reason for every other trainable one."""

from __future__ import annotations

import pytest
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


def split(model: nn.Module, *ignore: object) -> tuple[list[str], dict[str, str]]:
    found, uncovered = find_layer_blocks(model, ignore)  # type: ignore[arg-type]
    return [layer.name for layer in found], dict(uncovered)


def test_every_trainable_module_is_found_or_named_with_a_reason() -> None:
    found, uncovered = split(Zoo())
    assert found == ["body.conv", "head"]
    assert uncovered.keys() == {
        "Zoo",
        "embed",
        "body.grouped",
        "norm",
        "attention",
        "attention.out_proj",
        "frozen_weight",
    }
    assert "groups=2" in uncovered["body.grouped"]
    assert "frozen" in uncovered["frozen_weight"]
    assert "LayerNorm" in uncovered["norm"]
    assert "NonDynamicallyQuantizableLinear" in uncovered["attention.out_proj"]


def test_a_shared_parameter_leaves_all_its_modules_uncovered() -> None:
    model = Zoo()
    model.head.weight = model.embed.weight
    found, uncovered = split(model)
    assert found == ["body.conv"]
    assert "embed.weight = head.weight" in uncovered["head"]


def test_ignored_by_instance_class_name_and_container() -> None:
    model = Zoo()
    assert split(model, model.head)[0] == ["body.conv"]
    assert split(model, nn.Conv2d)[0] == ["head"]
    assert split(model, "conv")[0] == ["head"]
    assert split(model, model.body)[0] == ["head"]
    found, uncovered = split(model, model.body, "head", nn.LayerNorm)
    assert found == []
    for name in ("body.conv", "body.grouped", "head", "norm"):
        assert uncovered[name] == "ignored by ignore_modules"


def test_bad_ignore_modules_are_refused() -> None:
    for bad in (3, dict, ""):
        with pytest.raises(ConfigError, match="ignore_modules"):
            split(Zoo(), bad)
    with pytest.raises(ConfigError, match="give a list"):
        find_layer_blocks(Zoo(), "head")


def test_a_model_that_is_one_layer_has_a_name() -> None:
    assert split(nn.Linear(2, 2)) == (["Linear"], {})
