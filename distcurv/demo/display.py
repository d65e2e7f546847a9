"""Shows a run as it goes: a live table on a terminal, plain lines elsewhere; a table at the end."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Literal, Self

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from distcurv.demo.progress import Snapshot
from distcurv.demo.settings import DemoSettings
from distcurv.train.summary import bytes_text

_LINE_PERIOD_S = 1.0
# What fits on a terminal of 80 columns.
_TITLES = ("training", "step", "loss", "ms/step", "version", "staleness", "busy", "traffic")


class Display:
    """Live progress.  Enter it, `show` snapshots, leave it; then `final_table` may be printed."""

    def __init__(self, console: Console, settings: DemoSettings) -> None:
        self._console = console
        self._settings = settings
        self._newest: dict[str, Snapshot] = {}
        self._rates: dict[str, float] = {}
        self._last_line = 0.0
        self._live = (
            Live(self._table(), console=console, refresh_per_second=4)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """One line beside the progress."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, snapshot: Snapshot) -> None:
        """Take in the job's newest state."""
        before = self._newest.get(snapshot.method)
        if before is not None and snapshot.t > before.t:
            rate = (snapshot.bytes - before.bytes) / (snapshot.t - before.t)
            self._rates[snapshot.method] = rate
        self._newest[snapshot.method] = snapshot
        if self._live is not None:
            self._live.update(self._table())
            return
        now = time.monotonic()
        last = snapshot.step == self._settings.resolved_steps
        if last or before is None or now - self._last_line >= _LINE_PERIOD_S:
            self._last_line = now
            self.say(self._line(snapshot))

    def _cells(self, snapshot: Snapshot) -> dict[str, str]:
        cells = {
            "training": snapshot.method,
            "step": f"{snapshot.step}/{self._settings.resolved_steps}",
            "loss": f"{snapshot.loss:.4g}",
            "ms/step": f"{snapshot.step_ms:.1f}",
        }
        if snapshot.method == "baseline":
            return cells
        return cells | {
            "version": str(snapshot.version) if snapshot.version else "none",
            "staleness": str(snapshot.staleness),
            "busy": f"{snapshot.busy:.0%}" if snapshot.links_total else "no worker",
            "traffic": f"{bytes_text(self._rates.get(snapshot.method, 0.0))}/s",
            "links": f"{snapshot.links_up}/{snapshot.links_total}",
        }

    def _line(self, snapshot: Snapshot) -> str:
        cells = self._cells(snapshot)
        name = cells.pop("training")
        return f"{name:<9} " + "  ".join(f"{title} {text}" for title, text in cells.items())

    def _table(self) -> Table:
        settings = self._settings
        table = Table(
            title=f"distcurv demo: {settings.task}, ranks {settings.ranks}, "
            f"workers {settings.workers}, r = {settings.rank}",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for title in _TITLES:
            justify: Literal["left", "right"] = "left" if title == "training" else "right"
            table.add_column(title, justify=justify, no_wrap=True)
        for snapshot in self._newest.values():
            cells = self._cells(snapshot)
            table.add_row(*(cells.get(str(column.header), "") for column in table.columns))
        return table


def final_table(summary: dict[str, Any]) -> Table:
    """The comparison that the demo ends with."""
    table = Table(
        title=f"{summary['task']}, {summary['steps']} steps, ranks {summary['ranks']}, "
        f"workers {summary['workers']}, r = {summary['rank']}",
        title_justify="left",
    )
    table.add_column("")
    for name in ("AdamW", "distcurv", "difference"):
        table.add_column(name, justify="right")

    def compare(title: str, key: str, digits: str, relative: bool = True) -> None:
        base, ours = summary[f"baseline_{key}"], summary[key]
        if base is None or ours is None:
            table.add_row(title, "-", "-", "")
            return
        change = f"{ours / base - 1:+.1%}" if relative else f"x {ours / base:.2f}"
        table.add_row(title, format(base, digits), format(ours, digits), change)

    compare(f"final loss ({summary['loss_unit']})", "final_loss", ".4f")
    compare("step time, median (ms)", "median_step_ms", ".2f", relative=False)
    compare("step time, 99th percentile (ms)", "p99_step_ms", ".2f", relative=False)
    compare("training time (s)", "seconds", ".2f", relative=False)
    ours = {
        "versions installed": summary["versions_installed"],
        "  made by workers": summary["versions_from_workers"],
        "largest staleness (steps)": summary["max_staleness"],
        "statistics messages sent": summary["statistics_sent"],
        "block statistics dropped": (
            f"{summary['statistics_dropped']} of {summary['statistics_observed']}"
        ),
        "to / from workers": (
            f"{bytes_text(summary['bytes_to_workers'])} / "
            f"{bytes_text(summary['bytes_from_workers'])}"
        ),
        "replicas identical": "yes" if summary["replicas_identical"] else "NO",
        "install logs identical": "yes" if summary["install_log_identical"] else "NO",
    }
    table.add_section()
    for title, value in ours.items():
        table.add_row(title, "", str(value), "")
    return table
