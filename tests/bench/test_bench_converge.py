"""`bench converge` as a user runs it, its trainings in this process."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest
from bench_runs import bench

from distcurv import cli
from distcurv.bench import converge_study
from distcurv.bench.converge_command import _METHODS, _TASKS
from distcurv.bench.converge_peers import MAKERS
from distcurv.bench.converge_picture import _COLOURS
from distcurv.bench.converge_pool import Pool
from distcurv.bench.converge_request import Request
from distcurv.bench.converge_tasks import TASKS, ConvergeTask
from distcurv.bench.converge_train import train


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Trainings without processes, each noted; short timings."""
    ran: list[Request] = []

    def run(pool: Pool, request: Request) -> dict[str, Any]:
        ran.append(request)
        return train(request)

    monkeypatch.setattr(Pool, "_run", run)
    monkeypatch.setattr(converge_study, "_FIRST_STEPS", {True: 4, False: 2})
    monkeypatch.setattr(converge_study, "_STEADY_STEPS", 2)
    # The real one takes a second for what a small one shows as well.
    small = dataclasses.replace(TASKS["digits"], stretch=2)
    monkeypatch.setitem(cast(dict[str, ConvergeTask], TASKS), "autoencoder-big", small)
    return ran


def test_the_options_name_what_there_is() -> None:
    assert set(_METHODS) == set(MAKERS) == set(_COLOURS)
    assert set(_TASKS) == set(TASKS)


def test_a_tiny_study(in_process: list[Request], tmp_path: Path) -> None:
    options = (
        *("--tasks", "digits,autoencoder-big", "--methods", "sgd,muon,lowrank-soap"),
        *("--grid-points", "3", "--seeds", "2", "--steps", "4", "--repetitions", "1"),
        *("--deterministic-delay", "0"),
    )
    content = bench(tmp_path, "converge", *options)
    assert [head["task"] for head in content["tasks"]] == ["digits", "autoencoder-big"]
    rows = content["results"]
    assert [row["method"] for row in rows] == 2 * ["sgd", "muon", "lowrank-soap"]
    for row in rows:
        assert len(row["tried"]) == 3 and len(row["curves"]) == 2
        assert row["min"] <= row["mean"] <= row["max"]
        modes = {"one"} if row["method"] == "lowrank-soap" else {"one", "threads", "ranks"}
        assert set(row["pace"]) == modes
        assert set(row["seconds_to_target"]) == {"one-core", "equal"}
    muon = rows[1]
    assert content["tasks"][0]["target"] == pytest.approx(muon["mean"])
    assert muon["sooner_than_target_method"]["equal"] == 1.0
    # Losses with --jobs 1 come first, then times alone.
    timed = [request.timed for request in in_process]
    assert timed == sorted(timed)

    before = len(in_process)
    again = bench(tmp_path, "converge", *options)
    assert len(in_process) == before  # all of it was kept
    assert again["results"] == rows


def test_losses_alone(in_process: list[Request], tmp_path: Path) -> None:
    content = bench(
        tmp_path, "converge", "--tasks", "digits", "--methods", "sgd,adamw", "--grid-points", "1",
        "--seeds", "1", "--steps", "3", "--no-time", "--target-of", "adamw",
    )  # fmt: skip
    assert not any(request.timed for request in in_process)
    assert all(row["pace"] == {} for row in content["results"])
    # The best and its neighbours, which do not count as tried.
    assert [len(row["tried"]) for row in content["results"]] == [1, 1]
    assert len(in_process) == 6


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--methods", "sgd", "--target-of", "muon"), "--target-of"),
        (("--methods", "sgd,muon", "--deterministic-delay", "5000"), "--deterministic-delay"),
    ],
)
def test_bad_options(
    options: tuple[str, ...], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "converge", *options, "--out", str(tmp_path)]) == 2
    assert word in capsys.readouterr().err.strip().splitlines()[-1]
