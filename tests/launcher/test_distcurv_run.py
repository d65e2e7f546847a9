"""``distcurv run`` with real processes: exit codes, arguments, signals, and nobody left behind.

The script's `told()` holds the ids of each rank, of its parent torchrun and of a grandchild in a
session of its own; `below()` holds everything, workers included.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launcher_processes import Started, alive, until

HERE = Path(__file__).parent
FAKE_RUN = HERE / "fake_run.py"
SCRIPT = HERE / "script.py"
Start = Callable[..., Started]


def test_arguments_endpoints_and_success(start: Start) -> None:
    words = ["--workers", "9", "--nproc-per-node=7", "-m", "--", "x y", "--help"]
    started = start(FAKE_RUN, "--nproc_per_node", "2", "--workers=2", SCRIPT, *words)
    ranks = started.told(2)
    assert started.wait() == 0, started.errors.read_text()
    assert [rank["argv"] for rank in ranks] == [words, words]
    endpoints = ranks[0]["endpoints"].split(",")
    assert len(set(endpoints)) == 2 and ranks[1]["endpoints"] == ",".join(endpoints)
    assert all(endpoint.startswith("tcp://127.0.0.1:") for endpoint in endpoints)


def test_exit_code_is_the_scripts_and_all_end(start: Start) -> None:
    started = start(FAKE_RUN, "--nproc-per-node", "2", SCRIPT, "exit", "3")
    ranks = started.told(2)
    assert started.wait() == 3
    assert not [pid for rank in ranks for pid in rank["pids"] if alive(pid)]


def test_module_without_workers_keeps_the_environments_endpoints(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTCURV_ENDPOINTS", "tcp://127.0.0.1:5")
    started = start("-m", "distcurv", "run", "--workers", "0", "-m", "tests.launcher.script", "a")
    ranks = started.told(1)
    assert started.wait() == 0, started.errors.read_text()
    assert ranks[0]["argv"] == ["a"] and ranks[0]["endpoints"] == "tcp://127.0.0.1:5"


@pytest.mark.parametrize(
    ("signum", "verb"), [(signal.SIGINT, "hang"), (signal.SIGTERM, "hang"), (signal.SIGINT, "deaf")]
)
def test_a_signal_ends_every_process(start: Start, signum: signal.Signals, verb: str) -> None:
    started = start(FAKE_RUN, "--nproc-per-node", "2", "--grace", "1", SCRIPT, verb)
    pids = {pid for rank in started.told(2) for pid in rank["pids"]} | set(started.below())
    assert len(pids) == 6  # torchrun, 2 ranks, 2 grandchildren, 1 worker
    began = time.monotonic()
    started.process.send_signal(signum)
    assert started.wait() == 128 + signum
    print(f"ended {time.monotonic() - began:.2f} s after the signal")
    assert not [pid for pid in pids if alive(pid)]


def test_a_signal_while_workers_start_ends_every_process(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MUTE", "1")
    started = start(FAKE_RUN, SCRIPT, "hang")
    pids = until(started.below, "a worker")
    started.process.send_signal(signal.SIGTERM)
    assert started.wait() == 128 + signal.SIGTERM
    assert not [pid for pid in pids if alive(pid)]


def test_a_killed_launcher_leaves_no_orphans(start: Start) -> None:
    started = start(FAKE_RUN, "--nproc-per-node", "2", "--workers", "2", SCRIPT, "deaf")
    pids = {pid for rank in started.told(2) for pid in rank["pids"]} | set(started.below())
    assert len(pids) == 7
    started.process.kill()
    until(lambda: not [pid for pid in pids if alive(pid)], "every process ends")


def test_a_killed_torchrun_leaves_no_orphans(start: Start) -> None:
    started = start(FAKE_RUN, "--nproc-per-node", "2", SCRIPT, "hang")
    ranks = started.told(2)
    pids = {pid for rank in ranks for pid in rank["pids"]} | set(started.below())
    os.kill(ranks[0]["pids"][1], signal.SIGKILL)
    assert started.wait() == 128 + signal.SIGKILL
    assert not [pid for pid in pids if alive(pid)]


def test_a_killed_worker_comes_back_and_the_script_goes_on(start: Start) -> None:
    started = start(FAKE_RUN, SCRIPT, "hang")
    (rank,) = started.told(1)
    (worker,) = set(started.below()) - set(rank["pids"])
    os.kill(worker, signal.SIGKILL)
    text = until(
        lambda: "is ready again" in (said := started.errors.read_text()) and said, "a new worker"
    )
    assert f"worker0 (pid {worker}) ended by SIGKILL; starting it again at" in text
    assert rank["endpoints"] in text.partition("is ready again")[2]
    assert alive(rank["pids"][0]) and started.process.poll() is None


def test_the_real_worker(start: Start) -> None:
    started = start("-m", "distcurv", "run", SCRIPT)
    (rank,) = started.told(1)
    assert started.wait() == 0, started.errors.read_text()
    assert rank["endpoints"] in started.errors.read_text()  # the worker prints where it is
