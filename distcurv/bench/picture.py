"""Figures without a screen: made, drawn on by a benchmark, saved."""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

OURS, PEER = "#c2410c", "#7a7a7a"
_LETTERS_PER_INCH = 11  # of a title


def new_figure(
    panels: int, *, width: float = 5.5, height: float = 4.5, in_a_row: int | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure with ``panels`` axes of this width and height (inches), all beside each other or
    at most so many of them."""
    columns = panels if in_a_row is None else min(panels, in_a_row)
    rows = -(-panels // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, columns, index + 1) for index in range(panels)]


def save(figure: Figure, path: Path, title: str) -> None:
    """Write the picture; the path's ending says the format.  A title too long for it is broken."""
    letters = max(20, int(_LETTERS_PER_INCH * figure.get_figwidth()))
    lines = [wrap(line, letters) for line in title.split("\n")]
    figure.suptitle("\n".join(part for line in lines for part in line))
    figure.savefig(path, dpi=130)
