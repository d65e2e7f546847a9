"""From the ranks' results to summary.json: what came out, and whether the ranks agree.

Pure but for `read_results`.  Counts of statistics and bytes are each owner's own, so they add up
over the ranks; installs and staleness are the same everywhere, so they are taken once.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from distcurv.demo.settings import DemoSettings
from distcurv.demo.train import BETAS, result_path
from distcurv.errors import StateError

RankResult = dict[str, Any]
WARM_UP_STEPS = 5
SUMMED = (
    "versions_from_workers",
    "statistics_observed",
    "statistics_sent",
    "statistics_folded",
    "statistics_dropped",
    "statistics_pending",
    "statistics_in_flight",
    "bytes_to_workers",
    "bytes_from_workers",
    "refresh_failures",
)


def read_results(folder: Path, ranks: int) -> list[RankResult]:
    """The ranks' result files, by rank.

    Raises:
        StateError: a rank left none.
    """
    results = []
    for rank in range(ranks):
        path = result_path(folder, rank)
        if not path.exists():
            raise StateError(f"rank {rank} left no result in {folder}: it ended before its end")
        results.append(json.loads(path.read_text(encoding="utf-8")))
    return results


def timed_steps(step_ms: Sequence[float]) -> list[float]:
    """Step times without the first `WARM_UP_STEPS` (buffers are made, buckets rebuilt).

    Of a run that is no longer than that, the last step alone."""
    return list(step_ms[min(WARM_UP_STEPS, len(step_ms) - 1) :])


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` (0..1) of all values do not exceed."""
    ordered = sorted(values)
    index = min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))
    return ordered[index]


def summarise(
    settings: DemoSettings, results: Sequence[RankResult], worker_pids: Sequence[int]
) -> dict[str, Any]:
    """The content of summary.json.

    Step times are rank 0's: every rank waits for the others in each backward pass, so any rank's
    delay shows in them, and they add up to the wall time.  ``replicas_identical`` and
    ``install_log_identical`` compare all ranks with rank 0, for both trainings.
    """
    baseline = [result["methods"]["baseline"] for result in results]
    ours = [result["methods"]["distcurv"] for result in results]
    task = settings.problem
    times = timed_steps(ours[0]["step_ms"])
    baseline_times = timed_steps(baseline[0]["step_ms"])
    logs = [[tuple(entry[:3]) for entry in outcome["install_log"]] for outcome in ours]
    metrics = [outcome["metrics"] for outcome in ours]
    summary: dict[str, Any] = {
        "task": settings.task,
        "steps": settings.resolved_steps,
        "ranks": len(results),
        "workers": settings.workers,
        "rank": settings.rank,
        "install_delay": settings.install_delay,
        "seed": settings.seed,
        "worker_pids": list(worker_pids),
        "rank_pids": [result["pid"] for result in results],
        "loss_unit": task.unit,
        "final_loss": ours[0]["final_loss"],
        "baseline_final_loss": baseline[0]["final_loss"],
        "loss_ratio": ours[0]["final_loss"] / baseline[0]["final_loss"],
        "median_step_ms": median(times),
        "baseline_median_step_ms": median(baseline_times),
        "step_time_ratio": median(times) / median(baseline_times),
        "p99_step_ms": percentile(times, 0.99),
        "baseline_p99_step_ms": percentile(baseline_times, 0.99),
        "timed_from_step": len(ours[0]["step_ms"]) - len(times),
        "seconds": sum(ours[0]["step_ms"]) / 1000,
        "baseline_seconds": sum(baseline[0]["step_ms"]) / 1000,
        # The log also tells of versions that a newer one passed over before their install.
        "versions_installed": int(metrics[0]["versions_installed"]),
        "max_staleness": max(int(counts["max_staleness"]) for counts in metrics),
        **{key: sum(int(counts[key]) for counts in metrics) for key in SUMMED},
        "replicas_identical": all(
            outcome["checksum"] == outcomes[0]["checksum"]
            for outcomes in (baseline, ours)
            for outcome in outcomes
        ),
        "install_log_identical": all(log == logs[0] for log in logs),
        "checksum": ours[0]["checksum"],
        "baseline_checksum": baseline[0]["checksum"],
        "optimizer": {
            "name": "LowRankSOAP",
            "lr": task.distcurv_lr,
            "betas": list(BETAS),
            "weight_decay": task.weight_decay,
        },
        "baseline_optimizer": {
            "name": "AdamW",
            "lr": task.baseline_lr,
            "lr_grid": list(task.baseline_lr_grid),
            "betas": list(BETAS),
            "weight_decay": task.weight_decay,
        },
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return summary
