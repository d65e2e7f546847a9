"""Runs the demo: workers, training ranks, live progress, results; and ends all of it on Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from distcurv.demo.display import Display, final_table
from distcurv.demo.loss_plot import draw_losses
from distcurv.demo.progress import ProgressReader
from distcurv.demo.report import read_results, summarise
from distcurv.demo.settings import DemoSettings
from distcurv.demo.train import progress_path
from distcurv.errors import LaunchError
from distcurv.launcher import tree
from distcurv.launcher.exit_code import of_signal
from distcurv.launcher.job import Job, run_torchrun
from distcurv.launcher.signals import SignalBox
from distcurv.launcher.supervisor import Supervisor
from distcurv.observe.events import DIRECTORY_VARIABLE
from distcurv.observe.merge import merge_events, write_events
from distcurv.observe.timeline import chrome_trace

FAILED = 1
LOG_NAME = "ranks.log"
_POLL_S = 0.1
_WORKER_END_AFTER_SIGNAL_S = 1.0  # all must be gone within 5 s
_TAIL_LINES = 20
_ROUTINE = re.compile(r"\[worker\d+\] (INFO |tcp://)")


def run_demo(settings: DemoSettings, out: Path, *, summary_on_stdout: bool = False) -> int:
    """Train with and without distcurv, and write the results into ``out``.

    Returns the exit code: 0, 1 when the ranks failed, 128 + N after signal N.  With
    ``summary_on_stdout`` the summary is all that stdout gets, and progress goes to stderr.
    Main thread only, and of a process of its own: every process below it is ended.
    """
    console = Console(stderr=summary_on_stdout)
    tree.adopt_orphans()
    with (
        SignalBox() as signals,
        tempfile.TemporaryDirectory(prefix="distcurv-demo-") as name,
        Display(console, settings) as display,
    ):
        folder = Path(name)
        try:
            code, worker_pids = _run_processes(settings, folder, display, signals)
        except LaunchError:
            if not signals.received:
                raise
            code, worker_pids = FAILED, []
        finally:
            tree.end_descendants(os.getpid(), grace=0.0)
        if signals.received:
            display.say(f"ended by {signals.received[0].name}; nothing was written to {out}")
            return of_signal(signals.received[0])
        if code != 0:
            shutil.copy(_log_path(folder), out / LOG_NAME)
            display.say(_last_words(_log_path(folder)))
            display.say(
                f"the training ranks failed with exit code {code}; all that they said is in "
                f"{out / LOG_NAME}"
            )
            return FAILED
        summary = _write_results(settings, folder, out, worker_pids, display.say)
    if summary_on_stdout:
        sys.stdout.write(json.dumps(summary, indent=2) + "\n")
    console.print(final_table(summary))
    console.print(
        f"results: {out}/summary.json, events.jsonl, loss.png; open {out}/timeline.json "
        "in ui.perfetto.dev",
        soft_wrap=True,
        highlight=False,
    )
    return 0


def _run_processes(
    settings: DemoSettings, folder: Path, display: Display, signals: SignalBox
) -> tuple[int, list[int]]:
    """Workers and ranks from start to end; (exit code of the ranks, pids of the workers)."""
    display.say(
        f"{settings.task}: {settings.resolved_steps} steps with AdamW, then as many with distcurv; "
        f"training ranks: {settings.ranks}, curvature workers: {settings.workers}"
    )
    common = {DIRECTORY_VARIABLE: str(_events_folder(folder)), "OMP_NUM_THREADS": "1"}
    supervisor = Supervisor(
        settings.workers,
        threads=1,
        env=common,
        report=_reporter(display.say),
        cancelled=lambda: bool(signals.received),
    )
    with supervisor:
        endpoints = ",".join(supervisor.endpoints)
        # torchrun and torch leave folders in TMPDIR, and this one goes at the end.
        env = common | {"DISTCURV_ENDPOINTS": endpoints, "TMPDIR": str(folder)}
        with _log_path(folder).open("wb") as log:
            argv = ["--standalone", f"--nproc-per-node={settings.ranks}"]
            argv += ["-m", "distcurv.demo.train", str(folder), settings.to_json()]
            job = run_torchrun(argv, env=env, stdout=log, stderr=log)
            try:
                code = _watch(job, settings, folder, display, signals)
                worker_pids = supervisor.pids
            finally:
                if signals.received:
                    supervisor.end_timeout = _WORKER_END_AFTER_SIGNAL_S
                    supervisor.stop()  # before their owners are gone, whose answers they await
                job.kill()  # after a signal: a rank has nothing to save before its end
        return code, worker_pids


def _watch(
    job: Job, settings: DemoSettings, folder: Path, display: Display, signals: SignalBox
) -> int:
    """Show progress until the job has ended (its exit code) or a signal came (1)."""
    reader = ProgressReader([progress_path(folder, rank) for rank in range(settings.ranks)])
    while not signals.received:
        code = job.poll()
        snapshot = reader.poll()
        if snapshot is not None:
            display.show(snapshot)
        if code is not None:
            return code
        time.sleep(_POLL_S)
    return FAILED


def _write_results(
    settings: DemoSettings,
    folder: Path,
    out: Path,
    worker_pids: list[int],
    say: Callable[[str], None],
) -> dict[str, Any]:
    results = read_results(folder, settings.ranks)
    summary = summarise(settings, results, worker_pids)
    merged = merge_events(_events_folder(folder))
    for file, count in merged.damaged.items():
        say(f"{file}: {count} lines were no complete events and are left out of events.jsonl")
    write_events(merged.events, out / "events.jsonl")
    trace = json.dumps(chrome_trace(merged.events), separators=(",", ":"), allow_nan=False)
    (out / "timeline.json").write_text(trace, encoding="utf-8")
    draw_losses(out / "loss.png", summary, results[0])
    # Last, so that a summary.json stands for a complete set of results.
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def _events_folder(folder: Path) -> Path:
    return folder / "events"


def _log_path(folder: Path) -> Path:
    return folder / LOG_NAME


def _last_words(path: Path) -> str:
    """The last lines of the ranks' output before torchrun's own account of the failure."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    account = (i for i, line in enumerate(lines) if "torch.distributed.elastic" in line)
    return "\n".join(lines[: next(account, len(lines))][-_TAIL_LINES:])


def _reporter(say: Callable[[str], None]) -> Callable[[str], None]:
    """What the supervisor tells, without what every worker says as a matter of course."""

    def report(text: str) -> None:
        if not _ROUTINE.match(text):
            say(text)

    return report
