"""Processes for the launcher tests; each one is ended with everything below it, come what may."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launcher_processes import DEADLINE_S, Started, alive

from distcurv.launcher import tree


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """``start(*words)`` runs Python with these words; everything is killed when the test ends."""
    running: list[Started] = []
    seen: set[int] = set()

    def begin(*words: str | Path) -> Started:
        running.append(Started([str(word) for word in words], tmp_path / f"run{len(running)}"))
        return running[-1]

    yield begin
    for started in running:
        for path in started.folder.glob("rank*.json"):
            seen.update(json.loads(path.read_text())["pids"])
        seen.update(started.below())
        tree.kill(started.process.pid)
        started.process.wait(DEADLINE_S)
    for pid in seen:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
