"""Runs with ``wire_dtype="float16"``: the same bits over sockets, again, resumed, after a loss."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from distributed_tasks import SAVED_AT, SAVED_SETTINGS, Run
from test_checkpoint_worlds import resumed, state_of
from test_faults import (
    SETTINGS,
    assert_accounted,
    assert_sound,
    from_workers,
    installed,
    mortal,
    sessions,
    train_until,
)

from distcurv.launcher.supervisor import Supervisor

__all__ = ["mortal"]  # a fixture

DIMS = (24, 40, 32, 10)  # wide enough for sketches at rank 4
NARROW: dict[str, Any] = {
    "dims": DIMS,
    "rank": 4,
    "encoding": "sketch",
    "wire_dtype": "float16",
    "preconditioner_upd_interval": 5,
    "early_steps": 10,
    "install_delay": 2,
    "link_timeout": 60.0,  # whatever the machine is busy with
}
STEPS = 42
both_doors = pytest.mark.parametrize("door", ["kfac", "soap", "soap-activations"])


def bases(run: Run) -> dict[str, torch.Tensor]:
    return {
        f"{block}.{name}": tensor
        for block, tensors in run.versions().items()
        for name, tensor in tensors.items()
        if name.endswith(".U")
    }


@both_doors
def test_sockets_and_memory_give_the_same_bits(worker: Supervisor, door: str) -> None:
    with Run(door, "inline", **NARROW) as inline:
        inline.steps(STEPS)
    with Run(door, worker.endpoints, **NARROW) as remote:
        remote.steps(STEPS)
        assert remote.metrics()["versions_from_workers"] > 0
    with Run(door, "inline", **NARROW | {"wire_dtype": "float32"}) as wide:
        wide.steps(STEPS)
    assert remote.door.install_log == inline.door.install_log == wide.door.install_log
    assert remote.checksum() == inline.checksum()
    assert wide.checksum() != inline.checksum()
    assert len(bases(inline)) == 6
    for name, U in bases(inline).items():
        assert torch.equal(U, bases(remote)[name])
        gram = U.mT @ U
        assert (gram - torch.eye(len(gram))).abs().max() < 2e-6, name
        # Of the same space as in float32, as far as training that has gone apart allows.
        assert torch.linalg.matrix_norm(bases(wide)[name].mT @ U, 2) > 0.9


@both_doors
def test_the_bytes_halve(worker: Supervisor, door: str) -> None:
    sent, one_of_each = {}, {}
    for wire_dtype in ("float32", "float16"):
        with Run(door, worker.endpoints, **NARROW | {"wire_dtype": wire_dtype}) as run:
            run.steps(STEPS)
            pipeline = run.door._pipeline
            assert pipeline is not None
            pipeline.lanes.settle()  # the last version may be on its way
            metrics = run.metrics()
        sent[wire_dtype] = metrics["bytes_to_workers"]
        layouts = pipeline.table.published_layouts
        one_of_each[wire_dtype] = sum(layout.nbytes for layout in layouts)
        came = metrics["versions_from_workers"] / len(layouts) * one_of_each[wire_dtype]
        # What is acknowledged late is sent again.
        assert came <= metrics["bytes_from_workers"] < 1.5 * came
    for counted in (sent, one_of_each):
        # Scalars, eigenvalues and diagonal tails stay as they are, which shows at rank 4.
        assert 0.5 < counted["float16"] / counted["float32"] < 0.75


@both_doors
def test_a_log_replays_to_the_same_bits(door: str) -> None:
    # Not deterministic: when a version comes is the threads' affair, and the log says it.
    settings = NARROW | {"install_delay": None}
    with Run(door, "inline", **settings) as first:
        first.steps(STEPS)
    log = [list(record) for record in first.door.install_log]
    with Run(door, "inline", replay=log, **settings) as again:
        again.steps(STEPS)
    assert again.door.install_log == first.door.install_log
    assert again.checksum() == first.checksum()


@both_doors
def test_a_resumed_run_equals_the_one_that_was_not_interrupted(door: str) -> None:
    # Saved where nothing is under way, as test_checkpoint_worlds has it.
    settings = {key: NARROW[key] for key in ("dims", "rank", "encoding", "wire_dtype")}
    with saved_run(door, settings) as whole:
        whole.steps(SAVED_AT)
        state = state_of(whole)
        whole.steps(12)
    with resumed(door, state, SAVED_AT, **settings) as second:
        for name, U in bases(second).items():
            assert (U.mT @ U - torch.eye(U.shape[1])).abs().max() < 2e-6, name
        second.steps(12)
    assert second.checksum() == whole.checksum()
    assert second.door.install_log == whole.door.install_log


def saved_run(door: str, settings: dict[str, Any]) -> Run:
    return Run(door, "inline", **{**SAVED_SETTINGS, **settings})


def test_a_checkpoint_serves_either_setting() -> None:
    """What is installed is float32 in both."""
    settings = {key: NARROW[key] for key in ("dims", "rank", "encoding")}
    with saved_run("kfac", settings | {"wire_dtype": "float16"}) as run:
        run.steps(SAVED_AT)
        state, before = state_of(run), bases(run)
    with resumed("kfac", state, SAVED_AT, wire_dtype="float32", **settings) as wide:
        assert all(torch.equal(U, before[name]) for name, U in bases(wide).items())
        wide.steps(6)
        assert_sound(wide)


@pytest.mark.parametrize("door", ["kfac", "soap"])
def test_a_killed_worker_is_restarted_seeded_and_serves_again(
    mortal: Supervisor, door: str
) -> None:
    settings = {key: NARROW[key] for key in ("dims", "rank", "encoding", "wire_dtype")}
    with Run(door, mortal.endpoints, **{**SETTINGS, **settings}) as run:
        train_until(run, from_workers(run), "versions of the first worker")
        before = sessions(run)
        (pid,) = mortal.pids
        os.kill(pid, signal.SIGKILL)
        train_until(run, lambda metrics: sessions(run) > before, "another session")
        train_until(run, from_workers(run), "versions of the second worker")
        train_until(run, installed(run), "they are installed")
        assert mortal.pids != [pid]
        assert_accounted(run)
