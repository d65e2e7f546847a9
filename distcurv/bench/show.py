"""What a benchmark shows on the terminal: a progress bar while it works, a table at its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


class Bar:
    """Progress on stderr; enter it, `advance` it once per unit of work, leave it."""

    def __init__(self, title: str, total: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            # A bar that redraws itself ten times a second would be measured as well.
            auto_refresh=False,
        )
        self._title = title
        self._task = self._progress.add_task(title, total=total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def at(self, what: str) -> None:
        """Say what is being measured now."""
        self._progress.update(self._task, description=f"{self._title}: {what}", refresh=True)

    def advance(self) -> None:
        """One unit of work is done."""
        self._progress.update(self._task, advance=1, refresh=True)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: the first column to the left, the numbers to the right."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    # Piped into a file there is no width to keep to.
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)


def show_files(*paths: Path) -> None:
    """Say where the results are."""
    Console().print(
        "results: " + ", ".join(str(path) for path in paths), soft_wrap=True, highlight=False
    )
