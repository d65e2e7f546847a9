"""`bench step`: methods take turns, rows say what was measured, a run leaves a whole record."""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from bench_runs import bench, check_spread
from torch import nn

from distcurv import cli
from distcurv.bench import step_command, step_crew, step_models, step_options
from distcurv.bench.clock import peak_memory, pinned
from distcurv.bench.step_crew import MAKERS, RANKED, Member, Turn, Variant, variants
from distcurv.bench.step_distcurv import DISTCURV
from distcurv.bench.step_methods import Knobs, Trainer, sgd
from distcurv.bench.step_models import MODELS, Problem, make_problem
from distcurv.bench.step_peers import PEERS, require_package
from distcurv.bench.step_phases import PHASES, PhaseClock
from distcurv.bench.step_rows import row_of, worst_place
from distcurv.bench.step_run import take_turns
from distcurv.errors import ConfigError, StateError

TINY = ["--interval", "4", "--rank", "4", "--repetitions", "2", "--steps", "4", "--no-memory"]


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
    assert set(step_options.METHODS) == set(MAKERS)
    assert set(step_options.MODELS) == set(MODELS)
    assert set(step_options.ALIASES.values()) <= set(MAKERS)
    assert set(RANKED) <= set(MAKERS)


def test_methods_run_with_each_rank_and_worker_that_they_have() -> None:
    found = variants(("sgd", "kfac", "kfac-dense"), (4, 8), ("process", "idle"))
    assert found == [
        Variant("sgd"),
        *(Variant("kfac", rank, worker) for rank in (4, 8) for worker in ("process", "idle")),
        *(Variant("kfac-dense", None, worker) for worker in ("process", "idle")),
    ]


def test_a_tiny_run_in_process(tiny: None, tmp_path: Path) -> None:
    methods = "adamw,muon,distcurv,kfac,kfac-dense"
    content = bench(tmp_path, "step", "--methods", methods, "--worker", "inline", *TINY)
    assert content["threads"] == 1
    rows = {row["method"]: row for row in content["results"]}
    assert list(rows) == ["sgd", "adamw", "muon", "lowrank-soap", "kfac", "kfac-dense"]
    for name, row in rows.items():
        assert [len(turn) for turn in row["turns_ms"]] == [4, 4]
        assert row["step_ms"]["n"] == 8
        for key in ("over_sgd", "cpu_over_sgd"):
            check_spread(row[key])
        assert set(row["phases_ms"]) == set(PHASES)
        parts = [ms for ms in row["phases_ms"].values() if ms is not None]
        assert sum(parts) == pytest.approx(row["step_ms"]["mean"], rel=1e-6)
        assert row["memory"] is None and row["over_idle"] is None
        for phase in ("capture", "reduce_send", "install", "refresh", "apply"):
            assert (row["phases_ms"][phase] is not None) == (name in DISTCURV), (name, phase)
        for key in ("without_statistics_over_sgd", "capture_share", "apply_rate_share"):
            if name in DISTCURV:
                check_spread(row[key])
            else:
                assert row[key] is None
        assert row["worst_over_median"] > 0 and 0 <= row["worst_place"] < 4
    assert rows["sgd"]["over_sgd"]["median"] == 1.0


def test_a_tiny_run_with_workers_at_work_and_idle(tiny: None, tmp_path: Path) -> None:
    content = bench(tmp_path, "step", "--methods", "distcurv", "--worker", "process,idle", *TINY)
    _, process, idle = content["results"]
    assert (process["worker"], idle["worker"]) == ("process", "idle")
    check_spread(process["over_idle"])
    assert idle["over_idle"] is None
    for row in (process, idle):  # an idle worker's versions are installed as well
        assert row["phases_ms"]["install"] > 0


def test_a_method_may_be_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["bench", "step", "--methods", "distcurv,lowrank-soap"])
    assert code == 2
    assert "names lowrank-soap twice" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert cli.main(["bench", "step", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_tiny_run_on_a_gpu(tiny: None, tmp_path: Path) -> None:
    content = bench(tmp_path, "step", "--methods", "distcurv,kfac", "--device", "cuda", *TINY)
    for row in content["results"]:
        assert row["step_ms"]["min"] > 0
        parts = [ms for ms in row["phases_ms"].values() if ms is not None]
        assert sum(parts) == pytest.approx(row["step_ms"]["mean"], rel=1e-3)


@pytest.mark.parametrize("method", list(PEERS))
def test_peers_run(method: str, tiny: None, tmp_path: Path) -> None:
    try:
        require_package(method)
    except ConfigError as error:
        pytest.skip(str(error))
    content = bench(tmp_path, "step", "--methods", method, *TINY)
    sgd, row = content["results"]
    assert (sgd["method"], row["method"]) == ("sgd", method)
    check_spread(row["over_sgd"])
    if method in ("asdl-kfac", "low-rank-asdl"):
        assert row["phases_ms"]["refresh"] > 0
    if method == "kfac-pytorch":  # its inverses are made every tenth interval
        assert [len(turn) for turn in row["turns_ms"]] == [40, 40]


def failing(problem: Problem, knobs: Knobs, clock: PhaseClock, steps: int) -> Trainer:
    """A peer that breaks after so many steps, as one whose SVD does not converge."""
    trainer = sgd(problem, knobs, clock)
    works, done = trainer.train_step, itertools.count(1)

    def train_step() -> torch.Tensor:
        if next(done) > steps:
            raise torch.linalg.LinAlgError("the SVD did not converge\n(error code: 1)")
        return works()

    trainer.train_step = train_step
    return trainer


@pytest.mark.parametrize("steps", [2, 17])  # in the warm-up; in the first turn
def test_a_peer_that_fails_does_not_take_the_others_with_it(
    steps: int, tiny: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(step_crew.MAKERS, "soap", partial(failing, steps=steps))
    monkeypatch.setattr(step_command, "methods_of", lambda args: args.methods)
    content = bench(tmp_path, "step", "--methods", "soap,adamw", *TINY)
    assert [row["method"] for row in content["results"]] == ["sgd", "adamw"]
    (out,) = content["left_out"]
    assert (out["method"], out["rank"], out["worker"]) == ("soap", None, None)
    assert out["why"] == "_LinAlgError: the SVD did not converge (error code: 1)"


def test_our_own_methods_must_not_fail(
    tiny: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(step_crew.MAKERS, "adamw", partial(failing, steps=2))
    with pytest.raises(torch.linalg.LinAlgError):
        bench(tmp_path, "step", "--methods", "adamw", *TINY)


@pytest.mark.parametrize("error", [ModuleNotFoundError, SyntaxError])
@pytest.mark.parametrize("method", list(PEERS))
def test_a_peer_that_cannot_be_imported_is_refused(
    method: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        raise error(f"{name} is broken")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ConfigError, match=rf"--methods has {method}, which .*leave it out.*broken"):
        require_package(method)


@pytest.mark.parametrize("name", list(MODELS))
def test_models_are_as_named_and_always_the_same(name: str) -> None:
    first, second = make_problem(name, "cpu"), make_problem(name, "cpu")
    assert torch.equal(first.inputs, second.inputs)
    loss = first.loss()
    assert torch.isfinite(loss) and torch.equal(loss, second.loss())
    rows = {"autoencoder": 256, "charlm": 1024, "convnet": 64}[name]
    assert first.logits(first.model(first.inputs)).shape[0] == rows


def member(name: str, order: list[str], loss: float = 1.0, period: int = 1) -> Member:
    clock = PhaseClock("cpu")

    def train_step() -> torch.Tensor:
        order.append(name)
        clock.start("forward_backward")
        return torch.tensor(loss)

    return Member(Variant(name), Trainer(tiny_problem(), clock, train_step, "a test", period))


def test_methods_take_turns_forwards_and_backwards() -> None:
    order: list[str] = []
    crew = [member("a", order), member("b", order, period=3)]
    ignore: Callable[[str], None] = lambda text: None  # noqa: E731
    take_turns(crew, 3, 2, ignore)
    assert "".join(order) == "aabbb" + "bbbaa" + "aabbb"  # b needs three steps for one of each kind
    assert [turn.places for turn in crew[1].turns] == [[0, 1, 2]] * 3
    row = row_of(crew[1], [crew[0], crew[1]])
    assert len(row["turns_ms"]) == 3 and row["capture_share"] is None


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    with pytest.raises(StateError, match="bad"):
        take_turns([member("bad", [], float("nan"))], 1, 1, lambda text: None)


def turn(ms: list[float], captured: list[bool], apply: float, products: float | None) -> Turn:
    """A turn of steps that spend 1 ms on capture where they do, ``apply`` and the rest."""
    phases = [
        {"forward_backward": whole - apply - taken, "apply": apply, "capture": float(taken)}
        for whole, taken in zip(ms, captured, strict=True)
    ]
    return Turn(ms, phases, captured, list(range(len(ms))), 5.0, products)


def test_the_worst_place_counts_what_is_regular_and_not_what_is_not() -> None:
    calm = [False] * 4
    turns = [turn([10.0, 10, 10, 20], calm, 2.0, None) for _ in range(5)]
    turns[0].ms[0] = 500.0  # somebody else
    worst, place = worst_place(turns)
    assert (worst, place) == (2.0, 3)


def test_rows_by_hand() -> None:
    order: list[str] = []
    base, ours, idle = member("sgd", order), member("x", order), member("x", order)
    ours.variant, idle.variant = Variant("x", 4, "process"), Variant("x", 4, "idle")
    ours.trainer.apply_updates = True
    for _ in range(2):
        plain = turn([10.0, 10.0], [False, False], 0.0, None)
        for spent in plain.phases:
            spent["optimizer"] = 1.0
        base.turns.append(plain)
        ours.turns.append(turn([16.0, 12.0], [True, False], 5.0, 2.0))
        idle.turns.append(turn([14.0, 11.0], [True, False], 5.0, 2.0))
    row = row_of(ours, [base, ours, idle])
    assert row["over_sgd"]["median"] == pytest.approx(1.4)
    assert row["without_statistics_over_sgd"]["median"] == pytest.approx(1.2)
    assert row["over_idle"]["median"] == pytest.approx(28 / 25)
    assert row["capture_share"]["median"] == pytest.approx(1 / 16)
    assert row["apply_rate_share"]["median"] == pytest.approx(2 / 5)
    assert row["apply_rate_share_beyond_sgd"]["median"] == pytest.approx(2 / 4)
    assert row["worst_over_median"] == pytest.approx(16 / 14)


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
