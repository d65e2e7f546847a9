"""The pictures of `bench converge`: for each task loss against steps, and loss against seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from distcurv.bench.converge_methods import SERVED
from distcurv.bench.converge_rows import Pace
from distcurv.bench.picture import save

_COLOURS: Mapping[str, str] = {
    "sgd": "#9a9a9a",
    "adamw": "#4d4d4d",
    "muon": "#2563eb",
    "soap": "#059669",
    "shampoo": "#7c3aed",
    "asdl-kfac": "#a3a300",
    "lowrank-soap": "#c2410c",
    "kfac": "#db2777",
}


def draw(path: Path, tasks: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> None:
    """One line of panels for each task: against steps, and against seconds on each hardware."""
    names = {name for row in rows if row["pace"] for name in row["seconds_to_target"]}
    hardware = [None, *sorted(names, reverse=True)]  # one core first
    columns = len(hardware)
    figure = Figure(figsize=(5.5 * columns, 4.5 * len(tasks)), layout="constrained")
    FigureCanvasAgg(figure)
    for line, task in enumerate(tasks):
        panels = [
            figure.add_subplot(len(tasks), columns, line * columns + column + 1)
            for column in range(columns)
        ]
        own = [row for row in rows if row["task"] == task["task"]]
        _draw_task(panels, hardware, task, own)
    points, seeds = tasks[0]["points"], tasks[0]["seeds"]
    save(figure, path, f"best of {points} learning rates each, mean of {seeds} seeds")


def _draw_task(
    panels: Sequence[Axes],
    hardware: Sequence[str | None],
    task: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    for axes, name in zip(panels, hardware, strict=True):
        for row in rows:
            curve = mean_curve(row["curves"])
            steps, losses = [step for step, _ in curve], [loss for _, loss in curve]
            pace = None if name is None else _pace(row, name)
            if name is None:
                _line(axes, steps, losses, row["method"])
            elif pace is not None:
                # Not the first point: time 0 has no place on a logarithmic axis.
                seconds = [pace.seconds(step) for step in steps[1:]]
                _line(axes, seconds, losses[1:], row["method"])
        axes.set_xlabel("steps" if name is None else f"seconds, {name}")
        axes.set_title(f"{task['task']}, {task['steps']} steps")
        if name is not None:
            axes.set_xscale("log")
        _finish(axes, task)


def mean_curve(curves: Sequence[Sequence[Sequence[float]]]) -> list[tuple[float, float]]:
    """Mean over seeds at the points that all of them have."""
    return [
        (points[0][0], fmean(point[1] for point in points)) for points in zip(*curves, strict=False)
    ]


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], method: str) -> None:
    width = 2.0 if method in SERVED else 1.2
    axes.plot(x, y, color=_COLOURS[method], label=method, linewidth=width)


def _finish(axes: Axes, task: Mapping[str, Any]) -> None:
    if task["target"] is not None:
        axes.axhline(task["target"], color="#9a9a9a", linewidth=0.8, linestyle="--")
    axes.set_yscale("log")
    axes.set_ylabel(task["unit"])
    axes.grid(True, alpha=0.2)
    if axes.lines:
        axes.legend(fontsize=8)


def _pace(row: Mapping[str, Any], hardware: str) -> Pace | None:
    mode = "one" if hardware == "one-core" else row["equal_hardware_is"]
    pace = row["pace"].get(mode)
    if pace is None:
        return None
    return Pace(pace["first_steps"], 1e-3 * pace["first_steps_ms"], 1e-3 * pace["step_ms"])
