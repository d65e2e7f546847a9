"""Nothing of distcurv stays behind: not in torch, not in the model, not in a copy of it."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from capture_harness import TokenNet, batch, cross_entropy
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from distcurv import KfacConfig, LowRankSOAP, Preconditioner

SETTINGS: dict[str, Any] = {
    "rank": 2,
    "early_steps": 2,
    "preconditioner_upd_interval": 4,
    "curvature_upd_interval": 2,
}
Door = Preconditioner | LowRankSOAP


class Net(TokenNet):
    """With blocks that are found by the functions that use them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)
        self.norm = nn.LayerNorm(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.norm(x + self.attention(x, x, x)[0]))


def kfac(model: nn.Module) -> Preconditioner:
    return Preconditioner(model, KfacConfig(**SETTINGS), "inline")


def soap(model: nn.Module) -> LowRankSOAP:
    return LowRankSOAP(model, source="activations", workers="inline", **SETTINGS)


def torch_state() -> dict[str, Any]:
    """All that capture changes in torch while it is armed."""
    tables = {
        name: dict(value)
        for name, value in vars(torch_module).items()
        if name.startswith("_global_") and isinstance(value, dict)
    }
    functions = {name: value for name, value in vars(F).items() if callable(value)}
    probe = torch.compiler.set_stance("default")
    probe.__exit__(None, None, None)
    return {**tables, **functions, "stance": probe.prev.stance, "matmul": torch.matmul}


def model_state(model: nn.Module) -> list[Any]:
    """The dictionaries of all modules and the hooks of all parameters."""
    found: list[Any] = []
    for module in model.modules():
        found.append({key: repr(value) for key, value in vars(module).items()})
    for parameter in model.parameters():
        found.append((parameter._backward_hooks, parameter._post_accumulate_grad_hooks))
        found.append(sorted(vars(parameter)))
    return found


@pytest.fixture(autouse=True)
def _torch_is_left_as_it_was() -> Iterator[None]:
    before = torch_state()
    yield
    gc.collect()
    assert torch_state() == before


def train(model: nn.Module, door: Door, steps: int) -> None:
    for seed in range(steps):
        inputs, targets = batch(model, 6, seed)
        model.zero_grad()
        cross_entropy("mean")(model(inputs), targets).backward()
        door.step()


@pytest.mark.parametrize("make", [kfac, soap])
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_close_at_any_moment_leaves_nothing(make: Callable[[nn.Module], Door], steps: int) -> None:
    model = Net()
    before = torch_state()
    with make(model) as door:
        train(model, door, steps)
    assert torch_state() == before
    model.zero_grad()
    assert model_state(model) == model_state(copy.deepcopy(model))


@pytest.mark.parametrize("make", [kfac, soap])
@pytest.mark.parametrize("steps", [0, 1])
def test_a_forgotten_door_leaves_nothing(make: Callable[[nn.Module], Door], steps: int) -> None:
    model = Net()
    before = torch_state()
    door = make(model)
    train(model, door, steps)
    assert torch_state() != before or steps
    del door
    gc.collect()
    assert torch_state() == before


@pytest.mark.parametrize("make", [kfac, soap])
def test_the_model_is_the_same_for_copies_and_files_at_every_moment(
    make: Callable[[nn.Module], Door],
) -> None:
    model = Net()

    def written() -> tuple[int, int, int]:
        saved = io.BytesIO()
        torch.save(model, saved)
        return len(pickle.dumps(model)), len(saved.getvalue()), len(model_state(model))

    pristine, hooks = written(), model_state(model)
    with make(model) as door:
        armed = set()
        for seed in range(6):
            source = door._source
            assert source is not None
            armed.add(source.capture.is_armed)
            model.zero_grad()
            for steps in (model_state(model), model_state(copy.deepcopy(model))):
                assert [type(x) for x in steps] == [type(x) for x in hooks]
            assert written() == pristine
            inputs, targets = batch(model, 6, seed)
            loss = cross_entropy("mean")(model(inputs), targets)
            twin = pickle.loads(pickle.dumps(model))  # between forward and backward
            assert torch.equal(twin(inputs), model(inputs))
            loss.backward()
            door.step()
        assert armed == {True, False}
    model.zero_grad()
    assert written() == pristine
