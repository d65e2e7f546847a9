"""Every way to set DistributedDataParallel up, against the bare model (one gloo rank, in process).

Two steps of statistics, an install and steps without statistics are in every run; float32 sums in
another order stay within 1e-5 after them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from capture_harness import Harness, TokenNet, assert_same_totals, batch, cross_entropy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from distcurv import KfacConfig, LowRankSOAP, Preconditioner

SETTINGS: dict[str, Any] = {
    "rank": 3,
    "early_steps": 2,
    "early_interval": 1,
    "preconditioner_upd_interval": 4,
    "curvature_upd_interval": 2,
    "install_delay": 0,
}
STEPS = 9
MODES: dict[str, dict[str, bool]] = {
    "plain": {},
    "static": {"static_graph": True},
    "unused": {"find_unused_parameters": True},
    "views": {"gradient_as_bucket_view": True},
    "static-views": {"static_graph": True, "gradient_as_bucket_view": True},
}


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch._dynamo.reset()
        dist.destroy_process_group()


class Net(TokenNet):
    """With a branch that only some steps use, and checkpoints if asked for."""

    def __init__(self, *, branch: bool = False, reentrant: bool | None = None) -> None:
        super().__init__()
        self.side = nn.Linear(3, 5)
        self.branch, self.reentrant = branch, reentrant
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        sided = not self.branch or self.calls % 3 == 0
        hidden = self.first(x) + (self.side(x) if sided else 0.0)
        if self.reentrant is None:
            return self.head(hidden.tanh())
        out = checkpoint(lambda h: self.head(h.tanh()), hidden, use_reentrant=self.reentrant)
        assert isinstance(out, Tensor)
        return out


class Loop:
    """Training of a net, wrapped or not, by one of the doors."""

    def __init__(
        self, door: str, wrap: Any, *, accumulation: int = 1, clear: bool = True, **net: Any
    ) -> None:
        torch.manual_seed(0)
        self.model = Net(**net)
        self.run: nn.Module = wrap(self.model)
        self.accumulation, self.clear = accumulation, clear
        self.base: torch.optim.Optimizer | None = None
        self.door: Preconditioner | LowRankSOAP
        if door == "kfac":
            config = KfacConfig(damping=0.1, accumulation=accumulation, **SETTINGS)
            self.door = Preconditioner(self.run, config, "inline")
            self.base = torch.optim.SGD(self.run.parameters(), lr=0.05)
        else:
            self.door = LowRankSOAP(
                self.run,
                lr=0.01,
                source="activations",
                workers="inline",
                accumulation=accumulation,
                # The first basis diagonalises the first gradient: beside the diagonal there is
                # rounding, of which the default eps makes full steps.
                eps=1e-3,
                **SETTINGS,
            )

    def step(self, seed: int) -> None:
        inputs, targets = batch(self.model, 8, seed)
        (self.base or self.door).zero_grad(set_to_none=self.clear)  # type: ignore[union-attr]
        pieces = list(
            zip(inputs.chunk(self.accumulation), targets.chunk(self.accumulation), strict=True)
        )
        for number, (x, y) in enumerate(pieces, 1):
            waits = isinstance(self.run, DistributedDataParallel) and number < len(pieces)
            with self.run.no_sync() if waits else nullcontext():  # type: ignore[operator]
                (cross_entropy("mean")(self.run(x), y) / self.accumulation).backward()
        self.door.step()
        if self.base is not None:
            self.base.step()

    def params(self) -> list[Tensor]:
        with self.door:
            for seed in range(STEPS):
                self.step(seed)
            assert self.door.metrics()["version"] >= 3
            assert self.door.metrics()["statistics_nonfinite"] == 0
        return [p.detach() for p in self.model.parameters()]


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def bare(model: nn.Module) -> nn.Module:
    return model


@pytest.mark.parametrize("clear", [True, False], ids=["to-none", "to-zero"])
@pytest.mark.parametrize("door", ["kfac", "soap"])
@pytest.mark.parametrize("mode", MODES)
def test_a_run_equals_that_of_the_bare_model(mode: str, door: str, clear: bool) -> None:
    net = {"branch": mode == "unused"}

    def wrap(model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model, **MODES[mode])  # type: ignore[arg-type]

    assert_close(
        Loop(door, wrap, clear=clear, **net).params(),
        Loop(door, bare, clear=clear, **net).params(),
    )


@pytest.mark.parametrize("mode", ["plain", "static", "views"])
@pytest.mark.parametrize("door", ["kfac", "soap"])
def test_micro_batches_under_no_sync_equal_one_batch(door: str, mode: str) -> None:
    def wrap(model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model, **MODES[mode])  # type: ignore[arg-type]

    # static_graph knows no no_sync in its first step.
    accumulation = 1 if mode == "static" else 4
    assert_close(Loop(door, wrap, accumulation=accumulation).params(), Loop(door, bare).params())


@pytest.mark.parametrize(
    ("mode", "reentrant"), [("plain", False), ("static", False), ("static", True), ("views", False)]
)
def test_checkpoints_inside(mode: str, reentrant: bool) -> None:
    def wrap(model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model, **MODES[mode])  # type: ignore[arg-type]

    assert_close(Loop("kfac", wrap, reentrant=reentrant).params(), Loop("kfac", bare).params())


@pytest.mark.parametrize("outside", [True, False], ids=["around", "inside"])
def test_compiled_around_and_inside(outside: bool) -> None:
    def wrap(model: nn.Module) -> nn.Module:
        if outside:
            return torch.compile(DistributedDataParallel(model), backend="aot_eager")  # type: ignore[return-value]
        return DistributedDataParallel(torch.compile(model, backend="aot_eager"))  # type: ignore[arg-type]

    # A count of calls in the model would be a recompilation of its own making.
    looped, plain = Loop("kfac", wrap), Loop("kfac", bare)
    assert looped.door.block_names == plain.door.block_names
    assert_close(looped.params(), plain.params())


def test_views_of_buckets_are_written_in_place() -> None:
    loop = Loop("kfac", lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True))
    with loop.door:
        for seed in range(3):
            inputs, targets = batch(loop.model, 8, seed)
            loop.run.zero_grad()
            cross_entropy("mean")(loop.run(inputs), targets).backward()
            before = {n: (p.grad.data_ptr(), p.grad.clone()) for n, p in named_grads(loop.model)}
            loop.door.step()
            for name, parameter in named_grads(loop.model):
                assert parameter.grad.data_ptr() == before[name][0]
                assert not torch.equal(parameter.grad, before[name][1])


def named_grads(model: nn.Module) -> list[tuple[str, Any]]:
    return [(n, p) for n, p in model.named_parameters() if p.grad is not None]


def test_the_statistic_of_no_sync_micro_batches_is_that_of_the_joined_batch() -> None:
    model = TokenNet().double()
    inputs, targets = batch(model, 12)
    wrapped = DistributedDataParallel(model)
    whole, parts = Harness(model), Harness(model, accumulation=4)
    with whole.capture.armed(whole.bases, whole.sink):
        cross_entropy("mean")(wrapped(inputs), targets).backward()
    with parts.capture.armed(parts.bases, parts.sink):
        pieces = zip(inputs.chunk(4), targets.chunk(4), strict=True)
        for number, (x, y) in enumerate(pieces, 1):
            with wrapped.no_sync() if number < 4 else nullcontext():
                (cross_entropy("mean")(wrapped(x), y) / 4).backward()
    # Delivered in float32, from float64 sums.
    assert_same_totals(whole.totals, parts.totals, 3e-7)
    assert set(parts.deliveries.values()) == {4}
