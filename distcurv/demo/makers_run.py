"""Runs ``distcurv demo --makers``: one training after the other in this process, and their picture.

Workers, where there are any, serve one training after the other.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from distcurv.demo.makers_plot import draw_makers
from distcurv.demo.makers_registry import CHOICES
from distcurv.demo.makers_report import makers_table, summarise_makers
from distcurv.demo.makers_settings import MakersSettings
from distcurv.demo.makers_train import Training, train
from distcurv.errors import LaunchError
from distcurv.launcher import tree
from distcurv.launcher.exit_code import of_signal
from distcurv.launcher.signals import SignalBox
from distcurv.launcher.supervisor import Supervisor
from distcurv.train.provider import Workers

_BAR_PERIOD_S = 0.1
_WORKER_END_AFTER_SIGNAL_S = 1.0


def run_makers(settings: MakersSettings, out: Path, *, summary_on_stdout: bool = False) -> int:
    """Train with each maker, and write the results into ``out``.

    Returns the exit code: 0, or 128 + N after signal N.  With ``summary_on_stdout`` the summary is
    all that stdout gets, and progress goes to stderr.  Main thread only.
    """
    console = Console(stderr=summary_on_stdout)
    with SignalBox() as signals:
        try:
            trainings = _trainings(settings, console, signals)
        except LaunchError:
            if not signals.received:
                raise
            trainings = {}
    if signals.received:
        console.print(f"ended by {signals.received[0].name}; nothing was written to {out}")
        return of_signal(signals.received[0])
    summary = summarise_makers(settings, trainings)
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    (out / "summary.json").write_text(text, encoding="utf-8")
    curves = {
        name: {"losses": [_finite(loss) for loss in t.losses], "step_ms": t.step_ms}
        for name, t in trainings.items()
    }
    (out / "curves.json").write_text(json.dumps(curves, allow_nan=False), encoding="utf-8")
    draw_makers(out / "makers.png", summary, trainings)
    if summary_on_stdout:
        sys.stdout.write(text)
    console.print(makers_table(summary))
    console.print(
        f"results: {out}/makers.png, summary.json, curves.json", soft_wrap=True, highlight=False
    )
    return 0


def _trainings(
    settings: MakersSettings, console: Console, signals: SignalBox
) -> dict[str, Training]:
    """One after the other, until a signal comes."""
    trainings: dict[str, Training] = {}
    with ExitStack() as stack:
        stack.enter_context(_one_thread())
        workers: Workers = 0
        supervisor = None
        if settings.workers:
            tree.adopt_orphans()
            stack.callback(tree.end_descendants, os.getpid(), grace=0.0)
            supervisor = Supervisor(
                settings.workers,
                threads=1,
                env={"OMP_NUM_THREADS": "1"},
                report=lambda text: None,
                cancelled=lambda: bool(signals.received),
            )
            workers = stack.enter_context(supervisor).endpoints
        console.print(
            f"{settings.task}: {settings.resolved_steps} steps with each of "
            f"{', '.join(settings.names)}; curvature workers: {settings.workers}",
            highlight=False,
            soft_wrap=True,
        )
        bars = stack.enter_context(_Bars(console, settings))
        for name in settings.names:
            watch = bars.watch(name, lambda: bool(signals.received))
            trained = train(CHOICES[name], settings, workers, watch)
            if trained is None:
                if supervisor is not None:
                    supervisor.end_timeout = _WORKER_END_AFTER_SIGNAL_S
                break
            trainings[name] = trained
            bars.done(name, trained)
    return trainings


def _finite(loss: float) -> float | None:
    """A loss that JSON has."""
    return loss if abs(loss) < float("inf") else None


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread, as the demo's ranks: the model is tiny, and times are compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Bars:
    """A bar for each maker on a terminal, a line for each elsewhere."""

    def __init__(self, console: Console, settings: MakersSettings) -> None:
        self._console = console
        self._steps = settings.resolved_steps
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks = {
            name: self._progress.add_task(
                name.ljust(max(map(len, settings.names))), total=self._steps, start=False, loss="-"
            )
            for name in settings.names
        }

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def watch(self, name: str, ended: Callable[[], bool]) -> Callable[[int, float], bool]:
        """What `train` calls after each step of a maker's training."""
        self._progress.start_task(self._tasks[name])
        newest = 0.0

        def seen(step: int, loss: float) -> bool:
            nonlocal newest
            now = time.monotonic()
            if now - newest >= _BAR_PERIOD_S or step == self._steps:
                newest = now
                self._progress.update(self._tasks[name], completed=step, loss=f"{loss:.4g}")
            return not ended()

        return seen

    def done(self, name: str, trained: Training) -> None:
        """A training has ended."""
        final = "diverged" if trained.final_loss is None else f"{trained.final_loss:.4f}"
        self._progress.update(self._tasks[name], loss=final)
        self._progress.stop_task(self._tasks[name])
        if not self._console.is_terminal:
            seconds = sum(trained.step_ms) / 1000
            self._console.print(
                f"{name}: {len(trained.losses)} steps in {seconds:.1f} s, final loss {final}",
                highlight=False,
                soft_wrap=True,
            )
