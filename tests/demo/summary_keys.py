"""What summary.json must hold at least."""

from __future__ import annotations

KEYS = (
    "task",
    "steps",
    "ranks",
    "worker_pids",
    "rank_pids",
    "final_loss",
    "baseline_final_loss",
    "median_step_ms",
    "baseline_median_step_ms",
    "p99_step_ms",
    "versions_installed",
    "versions_from_workers",
    "max_staleness",
    "statistics_sent",
    "statistics_dropped",
    "bytes_to_workers",
    "bytes_from_workers",
    "replicas_identical",
    "install_log_identical",
)
