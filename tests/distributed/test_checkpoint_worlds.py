"""A checkpoint of any one rank restores all blocks, on another number of ranks too."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from distributed_jobs import Results
from distributed_tasks import DOORS, SAVED_AT, SAVED_SETTINGS, Run

from distcurv.launcher.supervisor import Supervisor


def through_file(state: Any) -> Any:
    """As torch.save and torch.load(weights_only=True) bring it back."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def resumed(door: str, state: Any, at: int, workers: Any = "inline", **settings: Any) -> Run:
    run = Run(door, workers, start_step=at, **{**SAVED_SETTINGS, **settings})
    restore(run, state)
    return run


def restore(run: Run, state: Any) -> None:
    state = copy.deepcopy(state)  # torch's optimizers go on with the tensors that they load
    run.model.load_state_dict(state["model"])
    run.door.load_state_dict(state["door"])
    if run.base is not None:
        run.base.load_state_dict(state["base"])


def state_of(run: Run) -> Any:
    return through_file(
        {
            "model": run.model.state_dict(),
            "door": run.door.state_dict(),
            "base": run.base.state_dict() if run.base is not None else {},
        }
    )


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("door", ["kfac", "soap"])
def test_either_rank_of_two_restores_one_rank(shared_job: Results, door: str, rank: int) -> None:
    (said, other) = shared_job.of(f"saved-{door}")
    assert said == other
    state = shared_job.tensors(f"saved-{door}", rank)
    with resumed(door, state, SAVED_AT) as run:
        assert [list(record) for record in run.door.install_log] == state["log"]
        before = {record[1]: record[2] for record in run.door.install_log}
        assert set(before) == {0, 1, 2}
        run.steps(2 * SAVED_SETTINGS["preconditioner_upd_interval"])
        # Versions go on where they were, at the steps of the run that was not interrupted.
        after = sorted(list(record) for record in run.door.install_log)
        assert after == sorted(said["log"])
        assert {record[1]: record[2] for record in after} == {
            block: version + 2 for block, version in before.items()
        }


@pytest.mark.parametrize("door", [door for door in DOORS if door != "soap-full"])
def test_a_resumed_run_equals_the_one_that_was_not_interrupted(door: str) -> None:
    """Bit for bit with ``install_delay=0``, saved where a window has just closed: then nothing is
    on its way.  (Dense kinds publish inverses, so their factor comes back with rounding.)"""
    with Run(door, **SAVED_SETTINGS) as run:
        run.steps(SAVED_AT)
        state = state_of(run)
        run.steps(20)
    with resumed(door, state, SAVED_AT) as again:
        again.steps(20)
    assert again.door.install_log == run.door.install_log
    if door == "kfac-dense":
        pairs = zip(again.params(), run.params(), strict=True)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)
    else:
        assert again.checksum() == run.checksum()


@pytest.mark.parametrize("door", ["kfac", "soap"])
def test_a_resumed_run_goes_on_with_a_worker(worker: Supervisor, door: str) -> None:
    """What the worker knew is gone with its session: it starts from what was installed."""
    with Run(door, **SAVED_SETTINGS) as run:
        run.steps(SAVED_AT)
        state = state_of(run)
        run.steps(20)
    with resumed(door, state, SAVED_AT, worker.endpoints) as again:
        again.steps(20)
        assert again.metrics()["versions_from_workers"] > 0
    assert again.door.install_log == run.door.install_log
    assert again.checksum() == run.checksum()


@pytest.mark.parametrize("door", ["kfac", "soap"])
def test_loading_into_a_run_under_way_drops_what_was_on_its_way(door: str) -> None:
    with Run(door, **SAVED_SETTINGS) as run:
        run.steps(SAVED_AT)
        state = state_of(run)
        run.steps(7)
        restore(run, state)
        run.step_count = SAVED_AT
        run.steps(20)
    with resumed(door, state, SAVED_AT) as again:
        again.steps(20)
    assert again.checksum() == run.checksum()
    metrics = run.metrics()
    assert metrics["statistics_dropped"] > 0
    folded_or_dropped = metrics["statistics_folded"] + metrics["statistics_dropped"]
    assert folded_or_dropped == metrics["statistics_observed"]
