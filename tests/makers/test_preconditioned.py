"""What all preconditioned makers share: state, chosen parameters, rows of one rank, the summary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distcurv.errors import ConfigError, StateError
from distcurv.makers import PreconditionedGradientMaker, PreconditioningConfig


class Halving(PreconditionedGradientMaker):
    """Divides gradients by two for each update of the preconditioner so far."""

    def update_curvature(self) -> None:
        self.state["seen"] = self.state.get("seen", torch.zeros(())) + 1

    def update_preconditioner(self) -> None:
        self.state.setdefault("by", {})["factor"] = 0.5 ** self.state["seen"]

    def precondition(self) -> None:
        for parameter in self.chosen_parameters().values():
            assert parameter.grad is not None
            parameter.grad *= self.state["by"]["factor"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 2)))


def step(gm: PreconditionedGradientMaker) -> list[Tensor]:
    gm.model.zero_grad()
    y = gm.setup_model_call(gm.model, torch.arange(8.0).reshape(4, 2))
    gm.setup_loss_repr(y.square().sum())
    gm.forward_and_backward()
    return [p.grad.clone() for p in gm.model.parameters() if p.grad is not None]


def test_a_state_dict_is_a_copy_and_so_is_what_is_loaded() -> None:
    gm = Halving(network(), PreconditioningConfig())
    step(gm)
    saved = gm.state_dict()
    assert saved["step"] == 1
    gm.state["by"]["factor"].zero_()
    assert saved["by"]["factor"] == 0.5
    gm.load_state_dict(saved)
    gm.state["by"]["factor"].zero_()
    assert saved["by"]["factor"] == 0.5


@pytest.mark.parametrize("state", [{}, {"steps": 3}, {"step": "3"}, {"step": -1}], ids=str)
def test_a_foreign_state_dict_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(StateError, match="Halving has 'step'"):
        Halving(network(), PreconditioningConfig()).load_state_dict(state)


def test_the_config_decides_the_steps() -> None:
    config = PreconditioningConfig(preconditioner_upd_interval=3, curvature_upd_interval=2)
    gm = Halving(network(), config)
    factors = []
    for _ in range(7):
        step(gm)
        factors.append(gm.state["by"]["factor"].item())
    assert factors == [0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.0625]
    assert gm.state["seen"] == 4


@pytest.mark.parametrize(
    ("ignored", "left"),
    [
        ([], ["0.weight", "0.bias", "1.weight", "1.bias", "2.0.weight", "2.0.bias"]),
        ([nn.BatchNorm1d], ["0.weight", "0.bias", "2.0.weight", "2.0.bias"]),
        (["2.", nn.BatchNorm1d], ["0.weight", "0.bias"]),
        ([nn.Sequential], []),
    ],
    ids=str,
)
def test_ignored_modules_are_left_out_with_what_they_contain(
    ignored: list[Any], left: list[str]
) -> None:
    gm = Halving(network(), PreconditioningConfig(ignore_modules=ignored))
    assert [*gm.chosen_parameters()] == left


def test_an_instance_frozen_and_tied_parameters_and_a_compiled_model() -> None:
    model = network()
    model[0].bias.requires_grad_(False)
    gm = Halving(torch.compile(model), PreconditioningConfig(ignore_modules=[model[2]]))
    assert [*gm.chosen_parameters()] == ["0.weight", "1.weight", "1.bias"]
    tied = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    tied[1].weight = tied[0].weight
    assert [*Halving(tied, PreconditioningConfig()).chosen_parameters()] == [
        "0.weight",
        "0.bias",
        "1.bias",
    ]
    # What an ignored module has is left alone, whoever has it as well.
    gm = Halving(tied, PreconditioningConfig(ignore_modules=[tied[1]]))
    assert [*gm.chosen_parameters()] == ["0.bias"]


def test_wrong_configs_and_modules_to_ignore_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match="ignore_modules has 3"):
        Halving(network(), PreconditioningConfig(ignore_modules=[3]))
    with pytest.raises(ConfigError, match="Halving got a dict"):
        Halving(network(), {"damping": 1})  # type: ignore[arg-type]


def test_one_rank_needs_no_collective() -> None:
    gm = Halving(network(), PreconditioningConfig())
    rows = torch.ones(3, 2)
    assert (gm.world_size, gm.own_rank, gm.rows_of_ranks(3)) == (1, 0, [3])
    assert gm.gather_rows(rows, [3]) is rows
    gm.average_over_ranks([rows])
    assert torch.equal(rows, torch.ones(3, 2))


def test_the_summary_says_where_it_is_computed() -> None:
    class Served(Halving):
        served = True

    config = PreconditioningConfig(workers="auto")
    assert Halving(network(), config).summary() == "Halving: computed on the ranks, within the step"
    assert Served(network(), config).summary() == "Served: served, workers='auto'"
