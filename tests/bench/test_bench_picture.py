"""Pictures: a title stays within its figure, however narrow that is."""

from __future__ import annotations

from pathlib import Path

import pytest

from distcurv.bench.picture import new_figure, save


@pytest.mark.parametrize("width", [3.0, 5.5, 9.0])
def test_a_long_title_is_broken_to_the_width_of_its_figure(width: float, tmp_path: Path) -> None:
    figure, _ = new_figure(1, width=width)
    words = "refreshes in process over those with a worker, where repetitions agree, " * 3
    save(figure, tmp_path / "picture.png", f"{words}\nframed: auto takes a worker")
    figure.draw_without_rendering()  # at the figure's own dpi
    title = figure._suptitle  # type: ignore[attr-defined]
    reach = title.get_window_extent()
    assert reach.x0 >= 0 and reach.x1 <= figure.bbox.width
    assert " ".join(title.get_text().split()).endswith("agree, framed: auto takes a worker")
