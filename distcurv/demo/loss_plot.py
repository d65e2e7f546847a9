"""Draws loss.png: the loss of both trainings, against steps and against seconds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_COLOURS = {"baseline": "#7a7a7a", "distcurv": "#c2410c"}
_SMOOTHING_SHARE = 0.015  # of the steps, to either side; a minibatch's loss is noisy


def draw_losses(path: Path, summary: dict[str, Any], result: dict[str, Any]) -> None:
    """Write the picture.

    Args:
        path: where to; the ending says the format.
        summary: of `distcurv.demo.report.summarise`.
        result: of rank 0; its losses are the global batch's, its times the steps' wall times.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    by_step, by_second = figure.subplots(1, 2, sharey=True)
    for method, outcome in result["methods"].items():
        optimizer = summary["optimizer" if method == "distcurv" else "baseline_optimizer"]
        final = summary["final_loss" if method == "distcurv" else "baseline_final_loss"]
        label = f"{optimizer['name']}, lr {optimizer['lr']:g}: ends at {final:.4g}"
        losses = outcome["losses"]
        seconds = list(accumulate(ms / 1000 for ms in outcome["step_ms"]))
        draw_curve(by_step, range(1, len(losses) + 1), losses, label, _COLOURS[method])
        draw_curve(by_second, seconds, losses, label, _COLOURS[method])
    dress(by_step, by_second, summary["loss_unit"])
    figure.suptitle(
        f"{summary['task']}: training ranks {summary['ranks']}, curvature workers "
        f"{summary['workers']}, low rank r {summary['rank']}, seed {summary['seed']}"
    )
    figure.savefig(path, dpi=130)


def smooth(values: Sequence[float], reach: int) -> list[float]:
    """Mean over the ``2 * reach + 1`` values around each (over fewer, evenly, at the ends)."""
    out = []
    for centre in range(len(values)):
        here = min(reach, centre, len(values) - 1 - centre)
        around = values[centre - here : centre + here + 1]
        out.append(sum(around) / len(around))
    return out


def dress(by_step: Axes, by_second: Axes, unit: str) -> None:
    """Labels, logarithmic losses, grids and legends of the two panels."""
    by_step.set_xlabel("optimizer steps")
    by_second.set_xlabel("training time (seconds)")
    by_step.set_ylabel(f"training loss ({unit})")
    for axes in (by_step, by_second):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(True, which="both", alpha=0.2)
        axes.legend()


def draw_curve(
    axes: Axes,
    places: Sequence[float],
    losses: Sequence[float],
    label: str,
    colour: str | tuple[float, float, float],
) -> None:
    """A training's losses, thin, and smoothed, thick."""
    axes.plot(places, losses, color=colour, alpha=0.3, linewidth=0.8)
    smoothed = smooth(losses, round(_SMOOTHING_SHARE * len(losses)))
    axes.plot(places, smoothed, color=colour, linewidth=1.8, label=label)
