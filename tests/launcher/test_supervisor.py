"""Workers are started, watched, restarted where they were, and never outlive their launcher."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

import pytest
from launcher_processes import alive, until

from distcurv.errors import ConfigError, LaunchError
from distcurv.launcher import Supervisor

FAKE = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))


def connects(endpoint: str) -> bool:
    host, port = endpoint.removeprefix("tcp://").split(":")
    with socket.socket() as probe:
        probe.settimeout(60.0)
        return probe.connect_ex((host, int(port))) == 0


def test_starts_ends_and_hands_out_devices() -> None:
    lines: list[str] = []
    devices = ("cpu", "cuda:1")
    with Supervisor(
        3, devices=devices, threads=2, command=FAKE, end_timeout=60.0, report=lines.append
    ) as s:
        pids, endpoints = s.pids, s.endpoints
        assert len(set(pids)) == len(set(endpoints)) == 3
        assert all(map(connects, endpoints))
        until(lambda: len(lines) >= 3, "a line from each worker")
    assert not any(map(alive, pids))
    assert sorted(lines) == [
        "[worker0] worker0 on cpu with 2 threads",
        "[worker1] worker1 on cuda:1 with 2 threads",
        "[worker2] worker2 on cpu with 2 threads",
    ]


def test_no_workers_is_fine() -> None:
    with Supervisor(0, command=FAKE) as s:
        assert s.endpoints == [] and s.pids == []


def test_killed_worker_is_restarted_on_its_port_and_said_so() -> None:
    lines: list[str] = []
    with Supervisor(1, command=FAKE, restart_delays=(0.05, 0.1), report=lines.append) as s:
        endpoints = s.endpoints
        for _ in range(2):
            first = s.pids[0]
            os.kill(first, signal.SIGKILL)
            new = until(lambda old=first: [pid for pid in s.pids if pid != old], "a new worker")[0]
            until(lambda pid=new: any(f"again (pid {pid}" in text for text in lines), "it is ready")
            assert s.endpoints == endpoints and connects(endpoints[0])
            assert any(f"pid {first}) ended by SIGKILL" in text for text in lines)
    assert [text.rpartition(" in ")[2] for text in lines if "starting it again" in text] == [
        "0.05 s",
        "0.1 s",
    ]
    assert not alive(new)


def test_worker_that_ends_before_it_is_ready_is_reported_with_its_words() -> None:
    with pytest.raises(LaunchError, match=r"worker[01] .*exit code 7 before.*this worker cannot"):
        Supervisor(2, command=FAKE, env={"FAKE_FAIL": "1"}, report=str).__enter__()


def test_worker_that_is_never_ready_is_given_up_and_killed() -> None:
    supervisor = Supervisor(1, command=FAKE, env={"FAKE_MUTE": "1"}, ready_timeout=0.5, report=str)
    with pytest.raises(LaunchError, match=r"worker0 was not ready after 0\.5 s"):
        supervisor.__enter__()
    assert supervisor.pids == []


def test_missing_command_is_a_launch_error() -> None:
    with pytest.raises(LaunchError, match="worker0 could not be started"):
        Supervisor(1, command=("/nonexistent/worker",), report=str).__enter__()


def test_a_start_can_be_cancelled() -> None:
    supervisor = Supervisor(1, command=FAKE, env={"FAKE_MUTE": "1"}, cancelled=lambda: True)
    with pytest.raises(LaunchError, match="told to stop"):
        supervisor.__enter__()
    assert supervisor.pids == []


@pytest.mark.parametrize("stopped", [False, True])
def test_worker_that_does_not_end_is_killed(stopped: bool) -> None:
    lines: list[str] = []
    stubborn = {} if stopped else {"FAKE_STUBBORN": "1"}
    with Supervisor(1, command=FAKE, env=stubborn, end_timeout=0.3, report=lines.append) as s:
        pid = s.pids[0]
        if stopped:
            os.kill(pid, signal.SIGSTOP)
    assert not alive(pid)
    assert any("did not end in 0.3 s: killed" in text for text in lines)


def test_workers_end_when_the_block_is_left_by_an_error() -> None:
    with pytest.raises(ZeroDivisionError), Supervisor(1, command=FAKE, report=str) as s:
        pid = s.pids[0]
        raise ZeroDivisionError
    assert not alive(pid)


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="workers=-1"):
        Supervisor(-1)
    with pytest.raises(ConfigError, match="devices is empty"):
        Supervisor(1, devices=())
