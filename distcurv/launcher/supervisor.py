"""Starts a set of curvature workers, keeps them alive, and ends every one of them.

As a library::

    with Supervisor(workers=2) as supervisor:
        run(endpoints=supervisor.endpoints)
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from distcurv.errors import ConfigError, LaunchError
from distcurv.launcher.keeper import WORKER_COMMAND, Keeper, WorkerPlan
from distcurv.launcher.lifeline import Lifeline

_POLL_S = 0.05
_KILL_PATIENCE_S = 5.0


def say(text: str) -> None:
    """The default report: one line on stderr."""
    print(f"distcurv: {text}", file=sys.stderr, flush=True)


class Supervisor:
    """Workers named ``worker0``, ``worker1``, ... on loopback ports that the system chooses.

    A worker that dies is started again on the port it had; between two starts passes a delay that
    doubles from ``restart_delays[0]`` up to ``restart_delays[1]`` seconds and begins anew once the
    worker stayed up.  ``report`` gets every such event and every line that a worker prints; it is
    called from several threads.

    Arguments: ``devices`` are given out in turn; ``threads`` per worker (None: the worker's own
    default); ``command`` replaces ``python -m distcurv worker``; ``env`` is added to the
    environment; ``ready_timeout`` and ``end_timeout`` in seconds; ``cancelled`` is asked while
    workers start, and may be as simple as a flag that a signal handler set.

    Raises `ConfigError` for values that cannot work.  Entering raises `LaunchError` when a worker
    ends before it is ready, is not ready in time, or the start is cancelled.
    """

    def __init__(
        self,
        workers: int,
        *,
        devices: Sequence[str] = ("cpu",),
        threads: int | None = None,
        command: Sequence[str] = WORKER_COMMAND,
        env: Mapping[str, str] | None = None,
        ready_timeout: float = 120.0,
        end_timeout: float = 5.0,
        restart_delays: tuple[float, float] = (0.5, 30.0),
        report: Callable[[str], None] = say,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        if workers < 0:
            raise ConfigError(f"workers={workers}: the number of workers must be 0 or more")
        if not devices:
            raise ConfigError("devices is empty: name at least one device, e.g. 'cpu'")
        self.end_timeout = end_timeout
        self._report = report
        self._cancelled = cancelled
        self._plans = [
            WorkerPlan(
                name=f"worker{i}",
                device=devices[i % len(devices)],
                threads=threads,
                command=tuple(command),
                env=env,
                ready_timeout=ready_timeout,
                first_delay=restart_delays[0],
                longest_delay=restart_delays[1],
            )
            for i in range(workers)
        ]
        self._keepers: list[Keeper] = []
        self._lifeline: Lifeline | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def endpoints(self) -> list[str]:
        """Where the workers listen, in the order of their names; fixed once they are ready."""
        return [keeper.endpoint for keeper in self._keepers if keeper.endpoint is not None]

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers alive now, in the order of their names."""
        return [pid for keeper in self._keepers if (pid := keeper.pid) is not None]

    def __enter__(self) -> Self:
        self._lifeline = Lifeline()
        self._folder = tempfile.TemporaryDirectory(prefix="distcurv-")
        try:
            for plan in self._plans:
                keeper = Keeper(
                    plan, Path(self._folder.name), self._lifeline.child_fd, self._report
                )
                self._keepers.append(keeper)
                keeper.start()
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def stop(self) -> None:
        """Ask all workers to end (SIGTERM) and restart none; does not wait."""
        for keeper in self._keepers:
            keeper.stop()

    def close(self) -> None:
        """End all workers: SIGTERM, then SIGKILL after ``end_timeout``; idempotent."""
        self.stop()
        self._join(time.monotonic() + self.end_timeout)
        for keeper in self._keepers:
            if keeper.is_alive():
                self._report(f"{keeper.plan.name} did not end in {self.end_timeout:g} s: killed")
                keeper.kill()
        self._join(time.monotonic() + _KILL_PATIENCE_S)
        if self._lifeline is not None:
            self._lifeline.close()
        if self._folder is not None:
            self._folder.cleanup()

    def _wait_until_ready(self) -> None:
        while True:
            waiting = [keeper for keeper in self._keepers if keeper.endpoint is None]
            for keeper in waiting:
                if keeper.failure is not None:
                    raise LaunchError(keeper.failure)
                if not keeper.is_alive():
                    raise LaunchError(f"{keeper.name} failed; its traceback is above")
            if not waiting:
                return
            if self._cancelled():
                raise LaunchError("told to stop before every worker was ready")
            waiting[0].join(_POLL_S)

    def _join(self, deadline: float) -> None:
        for keeper in self._keepers:
            if keeper.ident is not None:
                keeper.join(max(0.0, deadline - time.monotonic()))
