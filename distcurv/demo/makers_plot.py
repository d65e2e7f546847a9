"""Draws makers.png: the loss of every maker, against steps and against seconds."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from distcurv.demo.loss_plot import draw_curve, dress
from distcurv.demo.makers_registry import BASELINES
from distcurv.demo.makers_train import Training

_BASELINE_COLOURS = {"sgd": "#7a7a7a", "adamw": "#111111"}
_PALETTE = (
    *("#c2410c", "#1d4ed8", "#15803d", "#a21caf", "#ca8a04", "#0e7490", "#be123c", "#6d28d9"),
    *("#84cc16", "#f472b6", "#78350f", "#38bdf8", "#f59e0b", "#4c1d95", "#065f46"),
)


def draw_makers(path: Path, summary: dict[str, Any], trainings: Mapping[str, Training]) -> None:
    """Write the picture.

    Args:
        path: where to; the ending says the format.
        summary: of `distcurv.demo.makers_report.summarise_makers`.
        trainings: by the maker's name.
    """
    figure = Figure(figsize=(13.5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    by_step, by_second = figure.subplots(1, 2, sharey=True)
    ours = [name for name in trainings if name not in BASELINES]
    colours = _BASELINE_COLOURS | {name: _PALETTE[i % len(_PALETTE)] for i, name in enumerate(ours)}
    start = max((t.losses[0] for t in trainings.values()), default=1.0)
    for name, training in trainings.items():
        row = summary["makers"][name]
        ends = "diverged" if row["final_loss"] is None else f"{row['final_loss']:.4g}"
        label = f"{name}, lr {row['lr']:g}: {ends}"
        # What grows without bound shall not press the others into one line.
        losses = [min(loss, 2 * start) if loss == loss else 2 * start for loss in training.losses]
        seconds = list(accumulate(ms / 1000 for ms in training.step_ms))
        draw_curve(by_step, range(1, len(losses) + 1), losses, label, colours[name])
        draw_curve(by_second, seconds, losses, label, colours[name])
    dress(by_step, by_second, summary["loss_unit"])
    for axes in (by_step, by_second):
        axes.get_legend().remove()
        axes.set_ylim(top=1.15 * start)
    by_second.set_xscale("log")
    # Beside the panels: over them it would hide the curves of what starts slowly.
    figure.legend(*by_step.get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(
        f"{summary['task']}: {summary['steps']} steps, one process, curvature workers "
        f"{summary['workers']}, seed {summary['seed']}"
    )
    figure.savefig(path, dpi=130)
