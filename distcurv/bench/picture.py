"""Figures without a screen: made, drawn on by a benchmark, saved."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

OURS, PEER = "#c2410c", "#7a7a7a"


def new_figure(
    panels: int, *, width: float = 5.5, height: float = 4.5
) -> tuple[Figure, list[Axes]]:
    """A figure with ``panels`` axes beside each other."""
    figure = Figure(figsize=(width * panels, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, panels, index + 1) for index in range(panels)]


def save(figure: Figure, path: Path, title: str) -> None:
    """Write the picture; the path's ending says the format."""
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
