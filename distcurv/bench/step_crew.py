"""The methods of one run of `bench step`, each with a model and, if it needs one, a worker.

Every distcurv method has a worker process of its own (a worker serves one job at a time), on the
worker's core.  An *idle* worker works between the timed steps only: it is stopped (SIGSTOP) for a
step, and after it goes on until it has answered.  So the same versions are installed at the same
steps, and what is left of a step's time is what distcurv costs when refreshes disturb nothing.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from distcurv.bench.clock import Cores, pinned, synchronise
from distcurv.bench.step_distcurv import DISTCURV
from distcurv.bench.step_methods import TORCH, Knobs, Maker, Trainer
from distcurv.bench.step_models import make_problem
from distcurv.bench.step_peers import PEERS
from distcurv.bench.step_phases import PhaseClock
from distcurv.errors import StateError
from distcurv.launcher.supervisor import Supervisor
from distcurv.train import metrics
from distcurv.train.pipeline import Pipeline

MAKERS: Mapping[str, Maker] = {**TORCH, **DISTCURV, **PEERS}
RANKED = ("lowrank-soap", "kfac", "low-rank-asdl")
_PATIENCE_S = 60.0


class Variant(NamedTuple):
    """A method with what it runs with; None where it has no such thing."""

    method: str
    rank: int | None = None
    worker: str | None = None


def variants(methods: Sequence[str], ranks: Sequence[int], workers: Sequence[str]) -> list[Variant]:
    """Every method, once with each rank and each way to refresh that it has."""
    return [
        Variant(method, rank, worker)
        for method in methods
        for rank in (ranks if method in RANKED else [None])
        for worker in (workers if method in DISTCURV else [None])
    ]


@dataclass
class Turn:
    """What was measured in a turn, by step unless said otherwise.

    ``ms`` are wall times and ``phases`` their parts; ``captured``: it took statistics; ``places``
    count the steps modulo the method's period.  ``cpu_ms`` is the processor time of the mean
    step, ``products_ms`` that of the plain products of the apply's shapes, None without."""

    ms: list[float]
    phases: list[dict[str, float]]
    captured: list[bool]
    places: list[int]
    cpu_ms: float
    products_ms: float | None


@dataclass
class Member:
    """One method at work; its worker, if it has one; what was measured; how many steps it did;
    why it, another package's, could not go on."""

    variant: Variant
    trainer: Trainer
    device: str = "cpu"
    supervisor: Supervisor | None = None
    turns: list[Turn] = field(default_factory=list)
    steps: int = 0
    fault: str | None = None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For the body only the training runs, if the worker is meant to be idle."""
        if self.supervisor is None or self.variant.worker != "idle":
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
        synchronise(self.device)
        self.settle()

    def settle(self) -> None:
        """Wait until the worker has answered what it was sent, so that it disturbs nobody else.

        Raises:
            StateError: it does not."""
        pipeline = self.trainer.pipeline
        if pipeline is not None:
            _await(
                lambda: not metrics.collect(pipeline)["statistics_in_flight"],
                f"the worker of {self.variant.method} did not answer",
            )


@contextmanager
def make_crew(
    chosen: Sequence[Variant],
    model: str,
    device: str,
    cores: Cores,
    *,
    interval: int,
    capture_interval: int | None,
) -> Iterator[list[Member]]:
    """All methods, ready for their first step; what they started ends with the body."""
    with ExitStack() as stack:
        crew = []
        for variant in chosen:
            supervisor = None
            if variant.worker in ("process", "idle"):
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
                variant.rank or 1,
                interval,
                capture_interval,
                "inline" if supervisor is None else supervisor.endpoints,
            )
            make = MAKERS[variant.method]
            trainer = make(make_problem(model, device), knobs, PhaseClock(device))
            stack.callback(trainer.close)
            if trainer.pipeline is not None:
                _await_links(trainer.pipeline)
            crew.append(Member(variant, trainer, device, supervisor))
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
