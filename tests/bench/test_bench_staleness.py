"""`bench staleness`: the delay is what differs, and the record holds every seed and setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench_runs import bench

from distcurv import cli
from distcurv.bench.converge_pool import Pool
from distcurv.bench.converge_request import Request
from distcurv.bench.converge_tasks import TASKS
from distcurv.bench.converge_train import train
from distcurv.bench.staleness_command import _ARMS, _TASKS
from distcurv.bench.staleness_study import ARMS


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Trainings without processes, each noted."""
    ran: list[Request] = []

    def run(pool: Pool, request: Request) -> dict[str, Any]:
        ran.append(request)
        return train(request)

    monkeypatch.setattr(Pool, "_run", run)
    return ran


def test_the_options_name_what_there_is() -> None:
    assert set(_TASKS) == set(TASKS)
    assert set(_ARMS) == set(ARMS)


def test_a_tiny_run(in_process: list[Request], tmp_path: Path) -> None:
    content = bench(
        tmp_path, "staleness", "--steps", "52", "--delays", "0,4", "--batches", "16", "--seeds",
        "1", "--grid-points", "2",
    )  # fmt: skip
    rows = content["results"]
    assert [(r["batch"], r["eigenvalue_correction"], r["install_delay"]) for r in rows] == [
        (16, arm, delay) for arm in ("with", "without") for delay in (0, 4)
    ]
    for row in rows:
        assert len(row["final_losses"]) == 1 and len(row["tried"]) == 2
        assert row["min"] <= row["mean"] <= row["max"]
        best = min(row["tried"], key=lambda each: each["final"])
        assert row["lr"] == best["lr"]
        if row["install_delay"] == 0:
            assert row["final_losses"][0] == best["final"] and row["over_first_delay"] == 0
    for fresh, late in zip(rows[::2], rows[1::2], strict=True):
        assert fresh["final_losses"] != late["final_losses"]
        assert late["max_staleness"] > fresh["max_staleness"]
    # Two settings, the better one of them at two delays.
    assert len(in_process) == len(set(in_process)) == 2 * (2 + 2 - 1)
    assert all(not request.has_worker for request in in_process)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--delays", "0,5000"), "--interval"),
        (("--tasks", "charlm", "--batches", "100"), "--batches"),
        (("--batches", "5000"), "--batches"),
    ],
)
def test_bad_options(
    options: tuple[str, ...], word: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["bench", "staleness", *options, "--out", str(tmp_path)]) == 2
    assert word in capsys.readouterr().err.strip().splitlines()[-1]
