"""The demo with real processes: its results, and that nothing survives it."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import chrome_trace_format
import pytest
from demo_process import DemoProcess, living, wait_until_gone
from summary_keys import KEYS

from distcurv.demo import driver
from distcurv.launcher.tree import descendants

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")

STEPS = 110  # past the early phase, so that workers take over
DELAY = 5


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A whole run in the mode that installs at known steps: (directory, what stdout got)."""
    out = tmp_path_factory.mktemp("demo")
    scratch = tmp_path_factory.mktemp("scratch")
    words = f"--steps {STEPS} --install-delay {DELAY} --json --out {out}"
    with DemoProcess(scratch, *words.split()) as demo:
        code = demo.wait()
        assert code == 0, demo.text
        printed = demo.text
    assert list(scratch.iterdir()) == [], "temporary files were left behind"
    # Both streams are joined here: the JSON document is the part between its braces' lines.
    start, end = printed.index("\n{\n"), printed.index("\n}\n") + 2
    document: dict[str, Any] = json.loads(printed[start:end])
    return out, document


def test_summary_is_complete_and_the_ranks_agree(finished: tuple[Path, dict[str, Any]]) -> None:
    out, printed = finished
    summary = json.loads((out / "summary.json").read_text())
    assert printed == summary
    assert set(KEYS) <= set(summary)
    assert (summary["steps"], summary["ranks"]) == (STEPS, 2)
    assert len({*summary["rank_pids"], *summary["worker_pids"]}) == 3
    assert summary["replicas_identical"] is True
    assert summary["install_log_identical"] is True
    assert summary["versions_from_workers"] > 0
    assert summary["bytes_to_workers"] > 0 and summary["bytes_from_workers"] > 0
    assert summary["statistics_dropped"] == 0


def test_both_trainings_start_alike_and_distcurv_ends_lower(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    out, summary = finished
    first: dict[str, dict[str, float]] = {"baseline": {}, "distcurv": {}}
    for event in events(out):
        if event["kind"] == "step" and event["step"] == 0:
            first[event["method"]][event["who"]] = event["loss"]
    assert first["baseline"] == first["distcurv"]
    assert len(first["baseline"]) == 2
    assert summary["final_loss"] < summary["baseline_final_loss"]


def events(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def test_events_have_times_ids_and_sizes(finished: tuple[Path, dict[str, Any]]) -> None:
    found = events(finished[0])
    times = [event["t"] for event in found]
    assert times == sorted(times)
    assert {event["who"] for event in found} == {"rank0", "rank1", "worker0"}
    fields = {
        "statistic_sent": {"seq", "through", "blocks", "bytes"},
        "refresh": {"seq", "blocks", "versions", "t0", "t1"},
        "publish": {"blocks", "versions", "based_on", "bytes"},
        "install": {"step", "blocks", "versions", "based_on", "route"},
    }
    for kind, wanted in fields.items():
        of_kind = [event for event in found if event["kind"] == kind]
        assert of_kind, kind
        assert all(wanted <= set(event) for event in of_kind), kind
    made = [event for event in found if event["kind"] == "refresh" and event["who"] == "worker0"]
    assert made
    for event in found:
        if event["kind"] == "install" and event["route"] == "worker":
            assert {event["step"] - based_on for based_on in event["based_on"]} == {DELAY}


def test_timeline_shows_the_worker_beside_the_steps(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    trace = json.loads((finished[0] / "timeline.json").read_text())
    chrome_trace_format.check(trace)
    records = trace["traceEvents"]
    pids = {r["args"]["name"]: r["pid"] for r in records if r["name"] == "process_name"}
    assert set(pids) == {"rank0", "rank1", "worker0"}
    steps = [r for r in records if r["ph"] == "X" and r["cat"] == "step"]
    assert len(steps) == 2 * 2 * STEPS  # two trainings on two ranks
    refreshes = [r for r in records if r["ph"] == "X" and r["pid"] == pids["worker0"]]
    assert refreshes
    passed = {r["pid"] for r in records if r["ph"] == "t"}
    assert pids["worker0"] in passed, "no arrow leads over the worker to an install"


def test_picture_is_there(finished: tuple[Path, dict[str, Any]]) -> None:
    assert (finished[0] / "loss.png").read_bytes().startswith(b"\x89PNG")


def training(text: str) -> bool:
    """Whether the demo has said that the ranks take steps."""
    return "baseline  step" in text


def test_ctrl_c_ends_every_process(tmp_path: Path) -> None:
    with DemoProcess(tmp_path, "--steps", "100000", "--out", str(tmp_path / "out")) as demo:
        demo.read_until(training)
        before = demo.look()
        assert len(before) >= 5  # the driver, torchrun, two ranks, a worker
        demo.interrupt_group()
        assert demo.wait() == 130
        assert living(before) == set()
        assert "Traceback" not in demo.text
        assert "ended by SIGINT" in demo.text
    assert not (tmp_path / "out" / "summary.json").exists()


def test_ending_after_a_signal_is_meant_to_take_less_than_five_seconds() -> None:
    # The ranks are killed at once; the workers get this long, and are killed then.
    assert driver._WORKER_END_AFTER_SIGNAL_S <= 2


def test_nothing_survives_a_driver_that_was_killed(tmp_path: Path) -> None:
    with DemoProcess(tmp_path, "--steps", "100000", "--out", str(tmp_path / "out")) as demo:
        demo.read_until(training)
        before = demo.look()
        demo.process.kill()
        demo.process.wait()
        assert wait_until_gone(before) == set()


def test_rank_that_dies_ends_the_demo_with_its_words_kept(tmp_path: Path) -> None:
    words = "--steps 100000 --workers 0 --nproc-per-node 1 --out"
    with DemoProcess(tmp_path, *words.split(), str(tmp_path / "out")) as demo:
        demo.read_until(training)
        before = demo.look()
        (torchrun,) = [pid for pid in descendants(demo.process.pid) if descendants(pid)]
        (rank,) = descendants(torchrun)
        os.kill(rank, signal.SIGKILL)
        assert demo.wait() == 1
        assert living(before) == set()
    assert re.search(r"failed with exit code 137", demo.text)
    assert (tmp_path / "out" / driver.LOG_NAME).exists()
    assert not (tmp_path / "out" / "summary.json").exists()
