"""``distcurv worker`` under a launcher: it ends at once, and loses nothing by that."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from launcher_processes import ROOT, until

from distcurv.launcher.lifeline import Lifeline


def test_an_orderly_end_has_code_0_and_all_that_was_said(tmp_path: Path) -> None:
    ready, lifeline = tmp_path / "ready", Lifeline()
    words = ["--ready-file", str(ready), "--lifeline-fd", str(lifeline.child_fd)]
    worker = subprocess.Popen(
        [sys.executable, "-m", "distcurv", "worker", *words],
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=(lifeline.child_fd,),
        env={**os.environ, "PYTHONPATH": str(ROOT), "DISTCURV_EVENTS": str(tmp_path)},
    )
    try:
        until(ready.exists, "the worker is ready")
        worker.send_signal(signal.SIGTERM)
        said, _ = worker.communicate(timeout=120)
    finally:
        worker.kill()
        worker.wait()
        lifeline.close()
    assert worker.returncode == 0
    assert said == ready.read_text()
    events = [json.loads(line) for line in (tmp_path / "worker0.jsonl").read_text().splitlines()]
    assert (events[-1]["kind"], events[-1]["state"]) == ("link", "down")
