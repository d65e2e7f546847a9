"""The report from made-up results whose summary is known, and the picture of the losses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from summary_keys import KEYS

from distcurv.demo.loss_plot import draw_losses, smooth
from distcurv.demo.report import percentile, read_results, summarise, timed_steps
from distcurv.demo.settings import DemoSettings
from distcurv.demo.train import result_path
from distcurv.errors import StateError

STEPS = 105
SETTINGS = DemoSettings(steps=STEPS, ranks=2, workers=1)
COUNTS = {
    "versions_installed": 3,
    "max_staleness": 41,
    "versions_from_workers": 3,
    "statistics_observed": 100,
    "statistics_sent": 9,
    "statistics_folded": 90,
    "statistics_dropped": 4,
    "statistics_pending": 5,
    "statistics_in_flight": 1,
    "bytes_to_workers": 1000,
    "bytes_from_workers": 500,
    "refresh_failures": 0,
}


def results() -> list[dict[str, Any]]:
    """Two ranks: baseline steps of 10 ms; distcurv steps of 1, 2, ..., 105 ms."""
    made = []
    for rank in range(2):
        baseline = {
            "losses": [50.0 - 0.1 * n for n in range(STEPS)],
            "step_ms": [10.0] * STEPS,
            "final_loss": 40.0,
            "checksum": "aa",
            "install_log": [],
            "block_names": [],
            "metrics": {},
        }
        ours = {
            **baseline,
            "losses": [50.0 - 0.2 * n for n in range(STEPS)],
            "step_ms": [float(n + 1) for n in range(STEPS)],
            "final_loss": 30.0,
            "checksum": "bb",
            # Version 2 of block 0 was passed over by version 3: three installs, four rows.
            "install_log": [[0, 0, 1, 0, 0], [0, 1, 1, 0, 0], [20, 0, 2, 1, 8], [20, 0, 3, 9, 18]],
            "metrics": dict(COUNTS),
        }
        methods = {"baseline": baseline, "distcurv": ours}
        made.append({"rank": rank, "pid": 100 + rank, "methods": methods})
    return made


def test_summary_of_known_results() -> None:
    summary = summarise(SETTINGS, results(), [77])
    assert set(KEYS) <= set(summary)
    json.dumps(summary, allow_nan=False)
    assert summary["task"] == "autoencoder"
    assert (summary["steps"], summary["ranks"], summary["workers"]) == (STEPS, 2, 1)
    assert (summary["rank_pids"], summary["worker_pids"]) == ([100, 101], [77])
    assert (summary["final_loss"], summary["baseline_final_loss"]) == (30.0, 40.0)
    assert summary["loss_ratio"] == 0.75
    # Steps 6 to 105 count, so 100 times from 6 to 105 ms.
    assert summary["timed_from_step"] == 5
    assert summary["median_step_ms"] == 55.5
    assert summary["p99_step_ms"] == 104.0
    assert (summary["baseline_median_step_ms"], summary["baseline_p99_step_ms"]) == (10.0, 10.0)
    assert summary["step_time_ratio"] == 5.55
    # Installs are the same on all ranks; what owners count adds up.
    assert (summary["versions_installed"], summary["max_staleness"]) == (3, 41)
    assert (summary["versions_from_workers"], summary["statistics_sent"]) == (6, 18)
    assert (summary["bytes_to_workers"], summary["bytes_from_workers"]) == (2000, 1000)
    assert summary["statistics_dropped"] == 8
    assert summary["replicas_identical"] is True
    assert summary["install_log_identical"] is True


@pytest.mark.parametrize("method", ["baseline", "distcurv"])
def test_one_replica_that_differs_is_seen(method: str) -> None:
    made = results()
    made[1]["methods"][method]["checksum"] = "cc"
    summary = summarise(SETTINGS, made, [])
    assert summary["replicas_identical"] is False
    assert summary["install_log_identical"] is True


@pytest.mark.parametrize("change", ["step", "block", "version", "missing", "order"])
def test_install_log_that_differs_is_seen(change: str) -> None:
    made = results()
    log = made[1]["methods"]["distcurv"]["install_log"] = copy.deepcopy(
        made[1]["methods"]["distcurv"]["install_log"]
    )
    if change == "missing":
        log.pop()
    elif change == "order":
        log[0], log[1] = log[1], log[0]
    else:
        log[2][("step", "block", "version").index(change)] += 1
    summary = summarise(SETTINGS, made, [])
    assert summary["install_log_identical"] is False
    assert summary["replicas_identical"] is True


def test_warm_up_steps_do_not_count_unless_there_are_no_others() -> None:
    assert timed_steps([9, 8, 7, 6, 5, 4, 3]) == [4, 3]
    assert timed_steps([9, 8, 7]) == [7]
    assert timed_steps([9]) == [9]


def test_percentile_is_a_value_that_occurred() -> None:
    values = list(range(100, 0, -1))
    assert percentile(values, 0.99) == 99
    assert percentile(values, 1.0) == 100
    assert percentile(values, 0.5) == 50
    assert percentile(values, 0.0) == 1
    assert percentile([3.0], 0.99) == 3.0
    assert percentile([1.0, 2.0], 0.99) == 2.0


def test_results_are_read_by_rank_and_a_missing_one_is_named(tmp_path: Path) -> None:
    for result in results():
        result_path(tmp_path, result["rank"]).write_text(json.dumps(result))
    assert read_results(tmp_path, 2) == results()
    with pytest.raises(StateError, match="rank 2 left no result"):
        read_results(tmp_path, 3)


def test_picture_is_a_png_of_useful_size(tmp_path: Path) -> None:
    made = results()
    path = tmp_path / "loss.png"
    draw_losses(path, summarise(SETTINGS, made, []), made[0])
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    assert width >= 1200 and height >= 500


def test_smoothing_is_centred() -> None:
    assert smooth([1.0, 2.0, 3.0, 4.0], 1) == [1.0, 2.0, 3.0, 4.0]  # a line stays a line
    assert smooth([0.0, 0.0, 3.0, 0.0, 0.0], 1) == [0.0, 1.0, 1.0, 1.0, 0.0]
    assert smooth([5.0, 6.0], 0) == [5.0, 6.0]
