"""`bench wire`: every link carries both kinds of payload, and nothing is left behind."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest
from bench_runs import bench, check_spread

from distcurv.bench import wire_measure as wire
from distcurv.wire import zmq_link


@pytest.fixture(autouse=True)
def last_words_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine is busy with: the peer ends when it is told to."""
    monkeypatch.setattr(zmq_link, "LINGER_MS", 30_000)


def test_a_tiny_run(tmp_path: Path) -> None:
    content = bench(
        tmp_path, "wire", "--kilobytes", "4,100", "--megabytes", "1", "--repetitions", "1"
    )
    links = [row["link"] for row in content["results"]]
    assert links == ["memory", "ipc", "tcp", "raw-ipc", "raw-tcp"]
    for row in content["results"]:
        check_spread(row["round_trip_us"]["median"])
        for direction in ("statistics", "preconditioners"):
            assert set(row[direction]) == {"4", "100"}
            for found in row[direction].values():
                check_spread(found["gb_per_s"])
    assert set(content["memory_copy"]) == {"4", "100"}
    assert wire.PEER_THREAD not in [thread.name for thread in threading.enumerate()]


def test_many_small_messages_all_arrive() -> None:
    """More than the queues hold: a peer that gave up a full one would leave us waiting."""
    with wire.in_memory() as way:
        assert wire.throughput(way, 10, 500, "preconditioners")["gb_per_s"] > 0
    with wire.to_process("tcp", False, None) as way:
        assert wire.throughput(way, 4000, 1500, "statistics")["gb_per_s"] > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a clock of Linux")
def test_processor_time_of_a_process() -> None:
    ours = wire.process_seconds(os.getpid())
    assert ours is not None and ours > 0
    later = wire.process_seconds(os.getpid())
    assert later is not None and later >= ours
