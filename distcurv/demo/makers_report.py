"""From the makers' trainings to summary.json and the table at the end."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from rich.table import Table

from distcurv.demo.makers_registry import CHOICES
from distcurv.demo.makers_settings import MakersSettings
from distcurv.demo.makers_train import Training
from distcurv.demo.report import percentile, timed_steps


def summarise_makers(settings: MakersSettings, trainings: Mapping[str, Training]) -> dict[str, Any]:
    """The content of summary.json; ``makers`` has an entry for each name, in order."""
    return {
        "task": settings.task,
        "steps": settings.resolved_steps,
        "ranks": 1,
        "workers": settings.workers,
        "rank": settings.rank,
        "seed": settings.seed,
        "loss_unit": settings.problem.unit,
        "threads": 1,
        "makers": {name: _row(name, settings, trained) for name, trained in trainings.items()},
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _row(name: str, settings: MakersSettings, training: Training) -> dict[str, Any]:
    choice = CHOICES[name]
    times = timed_steps(training.step_ms)
    return {
        "maker": choice.maker_name,
        "optimizer": choice.optimizer,
        "lr": choice.lr,
        "momentum": choice.momentum if choice.optimizer == "SGD" else None,
        "settings": {**choice.settings, **({"rank": settings.rank} if choice.low_rank else {})},
        "options": dict(choice.options),
        "served": choice.served,
        "final_loss": training.final_loss,
        "diverged": training.diverged,
        "steps_done": len(training.losses),
        "mean_step_ms": sum(training.step_ms) / len(training.step_ms),
        "median_step_ms": median(times),
        "p99_step_ms": percentile(times, 0.99),
        "seconds": sum(training.step_ms) / 1000,
        "versions_installed": training.versions,
        "versions_from_workers": training.from_workers,
        "max_staleness": training.max_staleness,
    }


def makers_table(summary: dict[str, Any]) -> Table:
    """The comparison that the run ends with."""
    table = Table(
        title=f"{summary['task']}, {summary['steps']} steps, one process, workers "
        f"{summary['workers']}",
        title_justify="left",
    )
    table.add_column("")
    for title in ("lr", f"final loss ({summary['loss_unit']})", "ms/step, median", "mean", "s"):
        table.add_column(title, justify="right")
    if summary["workers"]:
        table.add_column("versions (of workers)", justify="right")
    for name, row in summary["makers"].items():
        final = row["final_loss"]
        made, by_worker = row["versions_installed"], row["versions_from_workers"]
        served = "-" if made is None else f"{made} ({by_worker})"
        table.add_row(
            name,
            f"{row['lr']:g}",
            f"diverged at step {row['steps_done']}" if final is None else f"{final:.4f}",
            f"{row['median_step_ms']:.2f}",
            f"{row['mean_step_ms']:.2f}",
            f"{row['seconds']:.2f}",
            *([served] if summary["workers"] else []),
        )
    return table
