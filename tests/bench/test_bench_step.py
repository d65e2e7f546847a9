"""`bench step`: phases add up, methods take turns, and a tiny run leaves a whole record."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bench_runs import bench, check_spread
from torch import nn

from distcurv.bench import step_models
from distcurv.bench.clock import peak_memory, pinned
from distcurv.bench.step_command import _METHODS, _MODELS, _WORKERS
from distcurv.bench.step_crew import WORKERS, Member
from distcurv.bench.step_methods import METHODS, OURS, Trainer
from distcurv.bench.step_models import MODELS, Problem, make_problem
from distcurv.bench.step_peers import PEERS
from distcurv.bench.step_phases import PHASES, PhaseClock
from distcurv.bench.step_run import row_of, take_turns
from distcurv.errors import StateError

TINY = ["--interval", "4", "--rank", "4", "--repetitions", "2", "--steps", "4"]


def tiny_problem() -> Problem:
    """A model that takes no time, in place of the real ones."""
    inputs = torch.rand(8, 12)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 12))
    return Problem(
        model, inputs, inputs, lambda out: out, nn.functional.binary_cross_entropy_with_logits
    )


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_models, "MODELS", {**MODELS, "autoencoder": tiny_problem})


def test_the_options_name_what_there_is() -> None:
    assert set(_METHODS) == set(METHODS) | set(PEERS)
    assert set(_MODELS) == set(MODELS)
    assert _WORKERS == WORKERS


@pytest.mark.parametrize("worker", ["inline", "process", "idle"])
def test_a_tiny_run(worker: str, tiny: None, tmp_path: Path) -> None:
    methods = "adamw,muon,lowrank-soap,kfac,kfac-dense" if worker == "inline" else "lowrank-soap"
    content = bench(
        tmp_path, "step", "--methods", methods, "--worker", worker, "--no-memory", *TINY
    )
    assert content["threads"] == 1
    rows = {row["method"]: row for row in content["results"]}
    assert list(rows) == ["sgd", *methods.split(",")]
    for name, row in rows.items():
        assert [len(turn) for turn in row["turns_ms"]] == [4, 4]
        assert row["step_ms"]["n"] == 8
        for key in ("over_sgd", "cpu_over_sgd", "worst_over_median"):
            check_spread(row[key])
        assert set(row["phases_ms"]) == set(PHASES)
        parts = [ms for ms in row["phases_ms"].values() if ms is not None]
        assert sum(parts) == pytest.approx(row["step_ms"]["mean"], rel=1e-6)
        assert row["peak_bytes"] is None
        for phase in ("capture", "exchange"):
            assert (row["phases_ms"][phase] is not None) == (name in OURS)
        if name in OURS:
            assert 0 < row["capture_share"]["median"] < 1
    assert rows["sgd"]["over_sgd"]["median"] == 1.0


def test_peers_run(tiny: None, tmp_path: Path) -> None:
    for module in ("pytorch_optimizer", "asdl"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install 'distcurv[bench]'")
    content = bench(tmp_path, "step", "--methods", "soap,shampoo,asdl-kfac", "--no-memory", *TINY)
    rows = {row["method"]: row for row in content["results"]}
    assert list(rows) == ["sgd", "soap", "shampoo", "asdl-kfac"]
    assert rows["asdl-kfac"]["phases_ms"]["refresh"] > 0


@pytest.mark.parametrize("name", list(MODELS))
def test_models_are_as_named_and_always_the_same(name: str) -> None:
    first, second = make_problem(name, "cpu"), make_problem(name, "cpu")
    assert torch.equal(first.inputs, second.inputs)
    loss = first.loss()
    assert torch.isfinite(loss) and torch.equal(loss, second.loss())
    rows = {"autoencoder": 256, "charlm": 1024, "convnet": 64}[name]
    assert first.logits(first.model(first.inputs)).shape[0] == rows


class Worker:
    def __init__(self) -> None:
        self.calls = 0

    def work(self, seconds: float) -> float:
        self.calls += 1
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        return seconds


def test_inner_phases_stop_the_outer_one() -> None:
    clock, worker = PhaseClock("cpu"), Worker()
    clock.watch(worker, "work", "capture")
    worker.work(0.0)  # outside a step: nothing is charged
    clock.start("forward_backward")
    start = time.perf_counter()
    assert worker.work(0.02) == 0.02
    clock.to("apply")
    spent = clock.stop()
    whole = time.perf_counter() - start
    assert worker.calls == 2
    assert list(spent) == ["forward_backward", "capture", "apply"]
    assert 0.02 <= spent["capture"] <= whole
    assert spent["forward_backward"] + spent["apply"] <= whole - 0.02


def test_watching_what_is_not_there_is_an_error() -> None:
    with pytest.raises(StateError, match=r"Worker\.rest"):
        PhaseClock("cpu").watch(Worker(), "rest", "capture")


def member(name: str, order: list[str], loss: float = 1.0) -> Member:
    clock = PhaseClock("cpu")

    def train_step() -> torch.Tensor:
        order.append(name)
        clock.start("forward_backward")
        return torch.tensor(loss)

    return Member(name, Trainer(clock, train_step, "a test"))


def test_methods_take_turns_forwards_and_backwards() -> None:
    order: list[str] = []
    crew = [member("a", order), member("b", order)]
    ignore: Callable[[str], None] = lambda text: None  # noqa: E731
    take_turns(crew, 3, 2, ignore)
    assert "".join(order) == "aabb" + "bbaa" + "aabb"
    row = row_of(crew[1], crew[0])
    assert len(row["turns_ms"]) == 3 and row["capture_share"] is None


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    with pytest.raises(StateError, match="bad"):
        take_turns([member("bad", [], float("nan"))], 1, 1, lambda text: None)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores cannot be chosen here")
def test_pinned_is_undone_and_inherited() -> None:
    before = os.sched_getaffinity(0)
    core = min(before)
    with pinned(core):
        assert os.sched_getaffinity(0) == {core}
        code = "import os; print(os.sched_getaffinity(0))"
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert child.stdout.strip() == str({core})
    assert os.sched_getaffinity(0) == before


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_memory("cpu")
    held = torch.ones(2 * before // 4 + 1)  # twice the peak so far
    assert peak_memory("cpu") >= held.nbytes
