"""A worker that does not read costs the rank neither memory nor steps nor its end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from distributed_jobs import HERE, environment, finish, tail
from distributed_links import MouthWorker

from distcurv.launcher.supervisor import Supervisor

DEADLINE_S = 300.0


def lonely(scenario: str, endpoint: str, folder: Path) -> dict[str, Any]:
    """What the scenario's process said; it has ended by itself."""
    said = folder / "said.json"
    program = str(HERE / "distributed_lonely.py")
    words = [sys.executable, program, scenario, str(said), endpoint, str(DEADLINE_S - 10)]
    code = finish(words, folder, DEADLINE_S, environment())
    assert code == 0, f"exit code {code}\n" + tail(folder)
    result: dict[str, Any] = json.loads(said.read_text())
    return result


@pytest.mark.parametrize("scenario", ["deaf", pytest.param("lost", marks=pytest.mark.slow)])
def test_memory_stays_flat_with_a_worker_that_never_reads(scenario: str, tmp_path: Path) -> None:
    """``deaf``: one session that stays open.  ``lost``: the rank gives it up, again and again."""
    with MouthWorker(deaf=True) as mouth:
        said = lonely(scenario, mouth.endpoint, tmp_path)
    metrics = said["metrics"]
    assert metrics["step"] == 1000
    assert metrics["versions_from_workers"] == 0
    assert metrics["statistics_observed"] > 1900
    # 400 windows were closed after the first look: kept, they would be two hundred megabytes.
    assert said["statistic"] > 500_000
    assert said["after"] - said["before"] < 20 * said["statistic"]
    assert said["accounted"], said["at_the_end"]
    assert said["at_the_end"]["statistics_folded"] == 0
    assert said["at_the_end"]["statistics_dropped"] == said["at_the_end"]["statistics_observed"]


@pytest.mark.parametrize(
    "scenario",
    [
        "hang-statistics",
        "hang-not-closed",
        pytest.param("hang-send", marks=pytest.mark.slow),
        pytest.param("hang-receive", marks=pytest.mark.slow),
    ],
)
def test_a_link_that_hangs_for_ever_holds_up_neither_the_steps_nor_the_exit(
    worker: Supervisor, scenario: str, tmp_path: Path
) -> None:
    said = lonely(scenario, worker.endpoints[0], tmp_path)
    assert said["steps"] == 200
    # The hanging thread is left behind: nothing else of ours is, and it does not hold the process.
    if scenario != "hang-not-closed":
        assert len([name for name in said["threads"] if name.startswith("distcurv")]) == 1
