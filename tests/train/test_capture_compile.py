"""Capture of compiled models: the same statistics, and no compilation that is distcurv's doing.

The backend is ``aot_eager``: it traces forward and backward as every backend does and needs no
compiler of the machine's.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from capture_harness import Harness, TokenNet, assert_same_totals, batch, cross_entropy
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint

from distcurv import KfacConfig, LowRankSOAP, Preconditioner
from distcurv.train.discover import bare_model, find_layer_blocks, named_parameters

BACKEND = "aot_eager"
SETTINGS: dict[str, Any] = {
    "rank": 2,
    "early_steps": 4,
    "early_interval": 2,
    "preconditioner_upd_interval": 4,
    "curvature_upd_interval": 2,
    "install_delay": 0,
}
STEPS = 14


class Net(nn.Module):
    """Rows [N, 4] to [N, 3]: a module of each kind of block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x).tanh()) * self.gain)


def plain(model: nn.Module) -> nn.Module:
    return model


def wrapped(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend=BACKEND)  # type: ignore[return-value]


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend=BACKEND)
    return model


def parts(model: nn.Module) -> nn.Module:
    model.first, model.norm = wrapped(model.first), wrapped(model.norm)
    return model


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "wrapped": wrapped,
    "in_place": in_place,
    "parts": parts,
}
DOORS = ("kfac", "soap")


@pytest.fixture(autouse=True)
def _nothing_compiled_before_nor_left() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Using `torch.compile")
        yield
    torch._dynamo.reset()
    assert not torch_module._has_any_global_hook()


class Loop:
    """A loop over a net that is compiled in some way before or after the door is made."""

    def __init__(self, door: str, way: Callable[[nn.Module], nn.Module], *, first: bool) -> None:
        torch.manual_seed(1)
        net = Net()
        self.net: nn.Module = way(net) if first else net
        self.base: torch.optim.Optimizer | None = None
        self.door: Preconditioner | LowRankSOAP
        if door == "kfac":
            self.door = Preconditioner(self.net, KfacConfig(damping=0.1, **SETTINGS), "inline")
            self.base = torch.optim.SGD(self.net.parameters(), lr=0.05)
        else:
            self.door = LowRankSOAP(
                self.net, lr=0.01, source="activations", workers="inline", **SETTINGS
            )
        self.net = self.net if first else way(net)
        self.parameters = [p for _, p in named_parameters(net)]

    def step(self, seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(8, 4, generator=generator)
        self.net.zero_grad()
        loss = F.mse_loss(self.net(x), x[:, :3].sin())
        loss.backward()
        self.door.step()
        if self.base is not None:
            self.base.step()
        return loss.item()

    @property
    def armed(self) -> bool:
        assert self.door._source is not None
        return self.door._source.capture.is_armed


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("first", [True, False], ids=["compiled-first", "compiled-after"])
@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_run_is_the_eager_run_and_compiles_once(
    way: str, first: bool, door: str
) -> None:
    """Step by step, eager steps and compiled ones by turns."""
    compiled, eager = Loop(door, WAYS[way], first=first), Loop(door, plain, first=True)
    assert compiled.door.block_names == eager.door.block_names
    with compiled.door, eager.door:
        steady: set[tuple[int, int]] = set()
        kinds = []
        for step in range(STEPS):
            armed = compiled.armed
            assert armed == eager.armed
            loss = compiled.step(step)
            assert abs(loss - eager.step(step)) <= 1e-5 * abs(loss)
            kinds.append(armed)
            if not all(kinds):
                steady.add((counters["stats"]["unique_graphs"], len(counters["graph_break"])))
        assert set(kinds) == {True, False}
        assert compiled.door.install_log == eager.door.install_log
        assert compiled.door.metrics()["version"] >= 3
    for ours, theirs in zip(compiled.parameters, eager.parameters, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    # From the first step that runs compiled code: no other graph, no graph break.
    graphs = 2 if way == "parts" else 1
    assert steady == {(graphs, 0)}, counters


def test_a_model_that_is_compiled_already_is_not_compiled_again() -> None:
    net = Net()
    runs = wrapped(net)
    x = torch.randn(5, 4)
    runs(x).sum().backward()
    compiled = dict(counters["stats"])
    assert compiled["unique_graphs"] == 1
    armed = []
    with Preconditioner(runs, KfacConfig(**SETTINGS), "inline") as precond:
        for _ in range(STEPS):
            armed.append(precond._source.capture.is_armed)
            # A guard that fails raises, where it would compile again; while armed none is asked.
            stance = nullcontext() if armed[-1] else torch.compiler.set_stance("fail_on_recompile")
            with stance:
                runs(x).sum().backward()
            precond.step()
    assert set(armed) == {True, False}
    assert dict(counters["stats"]) == compiled
    assert not counters["graph_break"]


def test_a_whole_compiled_step_function() -> None:
    """Forward, backward and `step` in one function that is compiled: it breaks where it must."""
    totals = []
    for way in (plain, lambda function: torch.compile(function, backend=BACKEND)):
        loop = Loop("kfac", plain, first=True)
        train = way(loop.step)  # type: ignore[arg-type]
        with loop.door:
            totals.append([train(step) for step in range(6)])
            assert loop.door.metrics()["version"] >= 2
    for left, right in zip(*totals, strict=True):
        assert abs(left - right) <= 1e-5 * abs(left)


def test_names_and_blocks_see_through_wrappers() -> None:
    net = Net()
    expected = [name for name, *_ in find_layer_blocks(net)[0]]
    weights = [name for name, _ in net.named_parameters()]
    assert bare_model(wrapped(net)) is net
    outer = wrapped(parts(net))
    assert [name for name, *_ in find_layer_blocks(outer)[0]] == expected
    assert [name for name, _ in named_parameters(bare_model(outer))] == weights
    ignored = find_layer_blocks(outer, [net.first])[0]
    assert [name for name, *_ in ignored] == [n for n in expected if not n.startswith("first")]
    assert not [
        name for name, *_ in find_layer_blocks(outer, ["_orig_mod"])[0] if name not in expected
    ]


def test_a_compiled_model_may_be_copied_while_armed() -> None:
    loop = Loop("kfac", in_place, first=True)
    with loop.door:
        assert loop.armed
        twin = copy.deepcopy(loop.net)
        x = torch.randn(3, 4)
        assert torch.equal(twin(x), loop.net(x))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_statistics_of_a_compiled_model_are_those_of_the_model(checkpointed: bool) -> None:
    model = TokenNet().double()
    inputs, targets = batch(model, 6)
    totals = []
    for run in (model, wrapped(model)):
        harness = Harness(model)
        with harness.capture.armed(harness.bases, harness.sink):
            logits = checkpoint(run, inputs, use_reentrant=False) if checkpointed else run(inputs)
            cross_entropy("mean")(logits, targets).backward()
        totals.append(harness.totals)
    assert_same_totals(*totals, 0.0)
    assert not counters["stats"]
