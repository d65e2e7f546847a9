"""A real ``distcurv demo`` in a process group of its own, and what became of its processes."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from distcurv.launcher.tree import descendants

DEADLINE_S = 300.0


class DemoProcess:
    """Ends every process of the demo on leaving, whatever the test did.

    ``scratch`` takes its temporary files, also those that a killed process leaves behind."""

    def __init__(self, scratch: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "distcurv", "demo", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        self.text = ""
        self.seen: set[int] = set()

    def read_until(self, done: Callable[[str], bool]) -> str:
        """What the demo printed, once ``done`` says so of it; an AssertionError if never."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + DEADLINE_S
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not done(self.text):
                assert selector.select(deadline - time.monotonic()), f"nothing came: {self.text}"
                chunk = os.read(self.process.stdout.fileno(), 65536)
                assert chunk, f"the demo ended early: {self.text}"
                self.text += chunk.decode()
        return self.text

    def look(self) -> set[int]:
        """The demo's processes now, itself among them; they are remembered for the end."""
        found = {self.process.pid, *descendants(self.process.pid)}
        self.seen |= found
        return found

    def interrupt_group(self) -> None:
        """What a terminal does on Ctrl-C: SIGINT to the whole foreground process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait(self) -> int:
        """The exit code; the rest of the output goes to ``text``."""
        rest, _ = self.process.communicate(timeout=DEADLINE_S)
        self.text += rest.decode()
        return self.process.returncode

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.look()
        for pid in living(self.seen - {self.process.pid}):
            os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def living(pids: Iterable[int]) -> set[int]:
    """Those that run; a zombie has ended.  Other owners of a reused id are told by their words."""
    found = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state not in "ZX" and b"python" in words:
            found.add(pid)
    return found


def wait_until_gone(pids: Iterable[int]) -> set[int]:
    """The processes that still live after the deadline: none, if all is well."""
    pids = set(pids)
    deadline = time.monotonic() + DEADLINE_S
    while living(pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return living(pids)
