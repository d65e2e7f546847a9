"""Keeps one worker process alive: starts it, waits until it is ready, restarts it when it died.

Each keeper is a thread.  It must be the one to start its worker: on Linux a worker is killed when
the *thread* that started it ends (see `lifeline.die_with_parent`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distcurv.launcher.exit_code import in_words

WORKER_COMMAND = (sys.executable, "-m", "distcurv", "worker")

_POLL_S = 0.05


@dataclass(frozen=True)
class WorkerPlan:
    """How one worker is started and how patient its keeper is.  Times are in seconds."""

    name: str
    device: str = "cpu"
    threads: int | None = None
    bind: str = "tcp://127.0.0.1:0"
    command: Sequence[str] = WORKER_COMMAND
    env: Mapping[str, str] | None = None
    ready_timeout: float = 120.0
    first_delay: float = 0.5
    longest_delay: float = 30.0
    steady_after: float = 30.0

    def argv(self, bind: str, ready_file: Path, lifeline_fd: int) -> list[str]:
        """The whole command line of one start."""
        words = [*self.command, "--bind", bind, "--ready-file", str(ready_file)]
        words += ["--device", self.device, "--name", self.name, "--lifeline-fd", str(lifeline_fd)]
        if self.threads is not None:
            words += ["--threads", str(self.threads)]
        return words


class Keeper(threading.Thread):
    """Keeps one worker.  ``endpoint`` is None until it was ready once; it never changes then.

    ``failure`` says why the first start did not succeed; the keeper has ended in that case."""

    def __init__(
        self, plan: WorkerPlan, folder: Path, lifeline_fd: int, report: Callable[[str], None]
    ) -> None:
        super().__init__(name=f"keeper-{plan.name}", daemon=True)
        self.plan = plan
        self.endpoint: str | None = None
        self.failure: str | None = None
        self._folder = folder
        self._lifeline_fd = lifeline_fd
        self._report = report
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._last_line = ""  # of this life's output; all of it went to the report
        self._starts = 0

    @property
    def pid(self) -> int | None:
        """Process id of the living worker; None while there is none."""
        with self._lock:
            process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def stop(self) -> None:
        """Restart no more, and ask the worker to end (SIGTERM, once)."""
        if not self._stopping.is_set():
            self._stopping.set()
            self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL the worker (also one that is stopped)."""
        self._signal(signal.SIGKILL)

    def run(self) -> None:
        """The thread: returns after `stop`, or when the first start failed."""
        delay = self.plan.first_delay
        while not self._stopping.is_set():
            problem, lived = self._one_life()
            if self._stopping.is_set():
                return
            if self.endpoint is None:
                said = f"; it said: {self._last_line}" if self._last_line else ""
                self.failure = problem + said
                return
            if lived >= self.plan.steady_after:
                delay = self.plan.first_delay
            self._report(f"{problem}; starting it again at {self.endpoint} in {delay:g} s")
            self._stopping.wait(delay)
            delay = min(2 * delay, self.plan.longest_delay)

    def _one_life(self) -> tuple[str, float]:
        """Start the worker and wait for its end: what happened, and how long it was ready."""
        name = self.plan.name
        self._starts += 1
        ready_file = self._folder / f"{name}.{self._starts}.ready"
        self._last_line = ""
        try:
            process = self._spawn(ready_file)
        except OSError as error:
            return f"{name} could not be started: {error}", 0.0
        if process is None:
            return f"{name} was not started", 0.0
        pump = threading.Thread(target=self._pump, args=(process,), daemon=True)
        pump.start()
        ready = self._await_ready(process, ready_file)
        since = time.monotonic()
        if ready is not None:
            if self._starts > 1:
                self._report(f"{name} is ready again (pid {process.pid}, {ready})")
            self.endpoint = ready
        elif process.poll() is None:
            # Not ready in time, or told to stop: in both cases nothing is lost by a hard end.
            process.kill()
            process.wait()
            pump.join(1.0)
            return f"{name} was not ready after {self.plan.ready_timeout:g} s", 0.0
        returncode = process.wait()
        pump.join(1.0)
        lived = time.monotonic() - since if ready is not None else 0.0
        when = "" if ready is not None else " before it was ready"
        return f"{name} (pid {process.pid}) {in_words(returncode)}{when}", lived

    def _spawn(self, ready_file: Path) -> subprocess.Popen[str] | None:
        bind = self.endpoint or self.plan.bind
        with self._lock:
            if self._stopping.is_set():
                return None
            self._process = subprocess.Popen(
                self.plan.argv(bind, ready_file, self._lifeline_fd),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env={**os.environ, **(self.plan.env or {})},
                start_new_session=True,
                pass_fds=(self._lifeline_fd,),
            )
            return self._process

    def _await_ready(self, process: subprocess.Popen[str], ready_file: Path) -> str | None:
        """The endpoint in the ready file; None when the worker died first or took too long."""
        deadline = time.monotonic() + self.plan.ready_timeout
        while time.monotonic() < deadline and not self._stopping.is_set():
            if ready_file.exists():
                lines = ready_file.read_text().splitlines()
                if lines:
                    return lines[0].strip()
            try:
                process.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                continue
            return None
        return None

    def _pump(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                text = line.rstrip()
                self._last_line = text or self._last_line
                self._report(f"[{self.plan.name}] {text}")

    def _signal(self, signum: signal.Signals) -> None:
        with self._lock:
            process = self._process
        if process is not None:
            process.send_signal(signum)  # does nothing to a process that has ended
