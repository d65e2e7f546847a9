"""A model whose parameters are replaced or moved after the preconditioner was made is refused.

Without the check nothing of it would be trained, and nobody would be told.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations

from distcurv import KfacConfig, LowRankSOAP, Preconditioner
from distcurv.errors import StateError

Door = Preconditioner | LowRankSOAP

DOORS: dict[str, Callable[[nn.Module], Door]] = {
    "preconditioner": lambda model: Preconditioner(model, KfacConfig(rank=2), "inline"),
    "soap": lambda model: LowRankSOAP(model, rank=2, workers="inline"),
    "soap-activations": lambda model: LowRankSOAP(
        model, rank=2, source="activations", workers="inline"
    ),
}


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def train(model: nn.Module, door: Door) -> None:
    model.zero_grad()
    model(torch.randn(5, 3)).square().mean().backward()
    door.step()


CHANGES: dict[str, tuple[Callable[[nn.Sequential], object], str]] = {
    "assigned": (
        lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
        "has been replaced by another",
    ),
    "parametrized": (
        lambda model: parametrizations.weight_norm(model[2]),
        "is no parameter any more",
    ),
    "moved where memory cannot be taken over": (
        lambda model: model.to("meta"),
        "has been replaced by another",
    ),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("steps", [0, 2])
def test_other_parameters_are_refused(door: str, change: str, steps: int) -> None:
    model = make()
    apply, text = CHANGES[change]
    with DOORS[door](model) as made:
        for _ in range(steps):
            train(model, made)
        apply(model)
        with pytest.raises(StateError, match=text):
            made.step()


@pytest.mark.gpu
@pytest.mark.parametrize("door", DOORS)
def test_another_device_is_refused(door: str) -> None:
    model = make()
    with DOORS[door](model) as made:
        model.to("cuda")
        with pytest.raises(StateError, match="is on cuda:0 now and was on cpu"):
            made.step()


@pytest.mark.parametrize("door", DOORS)
def test_sharding_afterwards_is_refused_and_before_it_is_fine(door: str) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = make()
        with DOORS[door](model) as made:
            fully_shard(model, mesh=mesh)
            with pytest.raises(StateError, match=r"replaced by a sharded one.*fully_shard"):
                train(model, made)
        model = make()
        fully_shard(model, mesh=mesh)
        with DOORS[door](model) as made:
            train(model, made)
            train(model, made)
            # A forward without a backward leaves the root's parameters gathered.
            model(torch.randn(5, 3)).square().mean().backward()
            with torch.no_grad():
                model(torch.randn(5, 3))
            if isinstance(made, Preconditioner):
                with pytest.raises(StateError, match="is gathered, not sharded"):
                    made.step()
                model.reshard()
            made.step()
    finally:
        dist.destroy_process_group()


def test_what_changes_numbers_alone_is_taken() -> None:
    model = make()
    with DOORS["preconditioner"](model) as made:
        train(model, made)
        model.load_state_dict(make().state_dict())
        model.requires_grad_(True).train()
        compiled = torch.compile(model, backend="eager")
        train(compiled, made)
        copied = copy.deepcopy(model)
        train(model, made)
        assert copied[0].weight is not model[0].weight
