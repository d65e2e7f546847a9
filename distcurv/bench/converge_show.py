"""The table that `bench converge` prints for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distcurv.bench.show import show_table

_NONE = "–"


def show(task: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Losses, what a learning rate 1.5 times off costs, and seconds to the target."""
    timed = any(row["pace"] for row in rows)
    hardware = list(rows[0]["seconds_to_target"]) if timed and task["target"] is not None else []
    target = (
        "" if task["target"] is None else f"; target {task['target']:.4g} ({task['target_of']})"
    )
    show_table(
        f"{task['task']}, {task['steps']} steps, {task['unit']}{target}",
        (
            *("method", "best lr", "final loss, mean", "min", "max", "lr / 1.5", "lr x 1.5"),
            *(("ms per step",) if timed else ()),
            *(column for name in hardware for column in (f"s to target, {name}", "sooner")),
        ),
        [_cells(row, hardware, timed) for row in rows],
    )


def _cells(row: Mapping[str, Any], hardware: Sequence[str], timed: bool) -> list[str]:
    lr = f"{row['best_lr']:g}" + ("" if row["best_is_inside"] else " (edge)")
    cells = [row["method"], lr, *(_number(row[key]) for key in ("mean", "min", "max"))]
    for side in ("lower", "higher"):
        over = row["lr_off"][side]["over_best"]
        cells.append("diverged" if over is None else f"{over:+.1%}")
    if timed:
        cells.append(
            ", ".join(f"{mode} {pace['step_ms']:.1f}" for mode, pace in row["pace"].items())
        )
    for name in hardware:
        seconds, sooner = row["seconds_to_target"][name], row["sooner_than_target_method"][name]
        cells.append(_NONE if seconds is None else f"{seconds['median']:.1f}")
        cells.append(_NONE if sooner is None else f"{sooner:.2f}x")
    return cells


def _number(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.4g}"
