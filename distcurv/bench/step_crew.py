"""The methods of one run of `bench step`, each with a model and, if it needs one, a worker.

Every distcurv method has a worker process of its own (a worker serves one job at a time), on the
worker's core.  An *idle* worker takes part up to the measured steps and is stopped (SIGSTOP) for
them: what is left of a step's time is what distcurv costs when refreshes disturb nothing.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from distcurv.bench.clock import Cores, pinned
from distcurv.bench.step_methods import METHODS, OURS, Knobs, Trainer
from distcurv.bench.step_models import make_problem
from distcurv.bench.step_peers import PEERS
from distcurv.bench.step_phases import PhaseClock
from distcurv.errors import StateError
from distcurv.launcher.supervisor import Supervisor
from distcurv.train import metrics
from distcurv.train.pipeline import Pipeline

WORKERS = ("process", "inline", "idle")
_PATIENCE_S = 60.0


@dataclass
class Member:
    """One method at work; its worker, if it has one, and whether that is stopped when timed.

    ``step_ms`` are wall times by turn, ``cpu_ms`` the processor time of a turn's mean step;
    ``phases`` (ms) and ``captured`` (it took statistics) are by step."""

    name: str
    trainer: Trainer
    supervisor: Supervisor | None = None
    idle: bool = False
    step_ms: list[list[float]] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)
    captured: list[bool] = field(default_factory=list)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For the body only the training runs, if the worker is meant to be idle."""
        if self.supervisor is None or not self.idle:
            yield
            return
        pids = self.supervisor.pids
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def settle(self) -> None:
        """Wait until the worker has answered what it was sent, so that it disturbs nobody else.

        Raises:
            StateError: it does not."""
        pipeline = self.trainer.pipeline
        if pipeline is not None:
            _await(
                lambda: not metrics.collect(pipeline)["statistics_in_flight"],
                f"the worker of {self.name} did not answer",
            )


@contextmanager
def make_crew(
    names: Sequence[str],
    model: str,
    device: str,
    worker: str,
    cores: Cores,
    *,
    rank: int,
    interval: int,
    capture_interval: int,
) -> Iterator[list[Member]]:
    """All methods, ready for their first step; what they started ends with the body."""
    with ExitStack() as stack:
        crew = []
        for name in names:
            supervisor = None
            if name in OURS and worker != "inline":
                with pinned(cores.worker):  # what is started here stays on that core
                    supervisor = stack.enter_context(
                        Supervisor(
                            workers=1,
                            devices=(device,),
                            threads=1,
                            env={"OMP_NUM_THREADS": "1"},
                            report=lambda text: None,
                        )
                    )
            knobs = Knobs(
                rank,
                interval,
                capture_interval,
                "inline" if supervisor is None else supervisor.endpoints,
            )
            make = METHODS[name] if name in METHODS else PEERS[name]
            trainer = make(make_problem(model, device), knobs, PhaseClock(device))
            stack.callback(trainer.close)
            if trainer.pipeline is not None:
                _await_links(trainer.pipeline)
            crew.append(Member(name, trainer, supervisor, worker == "idle"))
        yield crew


def _await_links(pipeline: Pipeline) -> None:
    def up() -> bool:
        counts = metrics.collect(pipeline)
        return counts["links_up"] == counts["links_total"]

    _await(up, "a worker could not be reached")


def _await(done: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not done():
        if time.monotonic() > deadline:
            raise StateError(f"{otherwise} within {_PATIENCE_S:g} s: see what it printed")
        time.sleep(0.002)
