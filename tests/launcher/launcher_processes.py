"""Starting real processes and waiting for what they do, for the launcher tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distcurv.launcher import tree

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
DEADLINE_S = 120.0


def until(condition: Callable[[], Any], what: str, deadline: float = DEADLINE_S) -> Any:
    """Wait for something true and return it; fails the test after ``deadline`` seconds."""
    end = time.monotonic() + deadline
    while not (found := condition()):
        if time.monotonic() > end:
            pytest.fail(f"not within {deadline:g} s: {what}")
        time.sleep(0.02)
    return found


def alive(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in ("Z", "X")


class Started:
    """A command with its output in files; `told` gives what the ranks of script.py wrote."""

    def __init__(self, words: list[str], folder: Path) -> None:
        self.folder = folder
        self.errors = folder / "stderr.txt"
        folder.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "TEST_FOLDER": str(folder), "PYTHONPATH": str(ROOT)}
        with open(folder / "stdout.txt", "wb") as out, open(self.errors, "wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=env,
                start_new_session=True,
            )

    def told(self, ranks: int) -> list[dict[str, Any]]:
        """What each rank wrote, once all of them did."""
        paths = [self.folder / f"rank{rank}.json" for rank in range(ranks)]
        until(lambda: self.process.poll() is not None or all(p.exists() for p in paths), "ranks up")
        assert all(p.exists() for p in paths), self.errors.read_text()
        return [json.loads(path.read_text()) for path in paths]

    def wait(self) -> int:
        return self.process.wait(DEADLINE_S)

    def below(self) -> list[int]:
        return tree.descendants(self.process.pid)
