"""The picture of `bench staleness`: a panel for each batch size, a line of panels for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from distcurv.bench.picture import OURS, PEER, save

_COLOURS = {"with": OURS, "without": PEER}


def draw(
    path: Path, tasks: Sequence[str], batches: Sequence[int], content: Mapping[str, Any]
) -> None:
    """Mean final loss against the delay; every seed as a point."""
    figure = Figure(figsize=(4.5 * len(batches), 4.0 * len(tasks)), layout="constrained")
    FigureCanvasAgg(figure)
    for line, task in enumerate(tasks):
        for column, batch in enumerate(batches):
            axes = figure.add_subplot(len(tasks), len(batches), line * len(batches) + column + 1)
            rows = [r for r in content["results"] if r["task"] == task and r["batch"] == batch]
            _draw_panel(axes, rows)
            axes.set_title(f"{task}, batch {batch}")
    save(figure, path, f"final loss, {content['settings']['seeds']} seeds")


def _draw_panel(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    delays = sorted({row["install_delay"] for row in rows})
    for arm in dict.fromkeys(row["eigenvalue_correction"] for row in rows):
        own = [row for row in rows if row["eigenvalue_correction"] == arm]
        whole = [row for row in own if row["mean"] is not None]
        axes.plot(
            [delays.index(row["install_delay"]) for row in whole],
            [row["mean"] for row in whole],
            "o-",
            color=_COLOURS[arm],
            label=f"{arm} eigenvalue correction, lr {own[0]['lr']:g}",
        )
        for row in own:
            points = [loss for loss in row["final_losses"] if loss is not None]
            place = delays.index(row["install_delay"])
            axes.plot([place] * len(points), points, ".", color=_COLOURS[arm], alpha=0.5)
    axes.set_xticks(range(len(delays)), [str(delay) for delay in delays])
    axes.set_xlabel("install_delay (steps)")
    axes.set_yscale("log")
    axes.grid(True, alpha=0.2)
    axes.legend(fontsize=8)
