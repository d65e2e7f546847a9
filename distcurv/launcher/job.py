"""The training job as one process: torchrun with its ranks, signalled, awaited and ended whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Self

from distcurv.launcher import tree
from distcurv.launcher.exit_code import of_returncode
from distcurv.launcher.lifeline import Lifeline


class Job:
    """A running torchrun.  As a context manager it ends every process of the job on leaving."""

    def __init__(self, process: subprocess.Popen[bytes], lifeline: Lifeline) -> None:
        self._process = process
        self._lifeline = lifeline

    @property
    def pid(self) -> int:
        """Process id of torchrun; the ranks are below it."""
        return self._process.pid

    @property
    def stdout(self) -> IO[bytes] | None:
        """What the job prints, if `run_torchrun` was called with ``stdout=PIPE``."""
        return self._process.stdout

    def poll(self) -> int | None:
        """The exit code, or None while the job runs."""
        returncode = self._process.poll()
        return None if returncode is None else of_returncode(returncode)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; `subprocess.TimeoutExpired` after ``timeout`` seconds."""
        return of_returncode(self._process.wait(timeout))

    def send_signal(self, signum: signal.Signals) -> None:
        """Signal torchrun, which passes SIGINT, SIGTERM, SIGHUP and SIGQUIT on to the ranks."""
        self._process.send_signal(signum)

    def kill(self) -> int:
        """SIGKILL torchrun, the ranks and whatever they started."""
        if self._process.poll() is None:
            tree.kill(self._process.pid)
        returncode = self._process.wait()
        self._lifeline.close()
        return of_returncode(returncode)

    def end(self, grace: float = 3.0) -> int:
        """SIGTERM, and SIGKILL to what is left after ``grace`` seconds; returns the exit code."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(grace)
            except subprocess.TimeoutExpired:
                return self.kill()
        self._lifeline.close()
        return of_returncode(self._process.returncode)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()


def run_torchrun(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
) -> Job:
    """Start torchrun in a session of its own, so that a terminal's Ctrl-C does not reach it.

    ``argv``: options of torchrun, then the script (or ``-m`` and a module) and its arguments.
    ``env``: variables added to those of this process.  ``stdout``, ``stderr``: as for `Popen`.
    Should this process die, by whatever signal, the job ends itself within seconds.
    """
    lifeline = Lifeline()
    command = [sys.executable, "-m", "distcurv.launcher.torchrun", str(lifeline.child_fd), *argv]
    try:
        process = subprocess.Popen(
            command,
            env={**os.environ, **(env or {})},
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            pass_fds=(lifeline.child_fd,),
        )
    except BaseException:
        lifeline.close()
        raise
    return Job(process, lifeline)
