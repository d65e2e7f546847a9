"""One training in a process of its own: its loss curve, or the time of each step.

Run as ``python -m distcurv.bench.converge_train REQUEST RESULT`` (JSON, path); with two ranks the
process starts once for each, and rank 0 writes the result.  What is timed is forward, backward and
update; batches are made and losses looked at outside of that, alike for all methods.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distcurv.bench.clock import choose_cores, now, pinned
from distcurv.bench.converge_methods import Setup, Training
from distcurv.bench.converge_peers import MAKERS
from distcurv.bench.converge_request import Request
from distcurv.bench.converge_tasks import TASKS, Batch, ConvergeTask, on_device
from distcurv.errors import StateError
from distcurv.launcher.supervisor import Supervisor
from distcurv.train.provider import Workers

RANK_VARIABLE = "DISTCURV_CONVERGE_RANK"
MEETING_VARIABLE = "DISTCURV_CONVERGE_MEETING"
_CORES = choose_cores()  # before anything here is pinned
_PATIENCE_S = 60.0
_COUNTS = (
    "max_staleness",
    "versions_installed",
    "versions_from_workers",
    "statistics_dropped",
)


def train(request: Request, rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """Train as asked; all ranks call it together.

    Returns ``curve`` (step, loss on the fixed set) with the last step in it, ``final`` (None after
    a divergence), ``diverged`` (the step at which the loss was not finite any more, or None) and
    ``why``, ``step_s`` (seconds by step, if timed), ``about`` the method, ``counts`` of its
    service.
    """
    task = TASKS[request.task]
    model = task.build(request.seed).to(request.device)
    forward: nn.Module = model
    if ranks > 1:
        forward = nn.parallel.DistributedDataParallel(model)
    with ExitStack() as stack:
        workers: Workers = "inline"
        if request.has_worker:
            workers = stack.enter_context(_worker(request.timed, request.device))
        setup = Setup(
            task,
            model,
            forward,
            request.lr,
            request.seed,
            workers,
            request.install_delay,
            request.interval,
        )
        training = MAKERS[request.method](setup)
        stack.callback(training.close)
        if request.has_worker:
            _await_links(training)
        run = _Run(request, task, model, training)
        run.train(rank, ranks)
        counts = training.service.metrics() if training.service is not None else {}
    return {
        "about": training.about,
        "curve": run.curve,
        "final": run.curve[-1][1] if run.curve and run.diverged is None else None,
        "diverged": run.diverged,
        "why": run.why,
        "step_s": run.step_s,
        "counts": {name: counts[name] for name in _COUNTS if name in counts},
    }


class _Run:
    """The steps of one training."""

    def __init__(
        self, request: Request, task: ConvergeTask, model: nn.Module, training: Training
    ) -> None:
        self._request, self._task, self._model, self._training = request, task, model, training
        self.curve: list[tuple[int, float]] = []
        self.step_s: list[float] = []
        self.diverged: int | None = None
        self.why: str | None = None

    def train(self, rank: int, ranks: int) -> None:
        request, task = self._request, self._task
        samples = request.rows // task.rows_per_sample
        for step in range(request.steps):
            due = bool(request.eval_every) and step % request.eval_every == 0
            if due and self._evaluate(step):
                return
            batch = _share(task.batch(step, request.seed, samples), rank, ranks)
            batch = on_device(batch, request.device)
            start = now(request.device) if request.timed else 0.0
            try:
                loss = self._training.step(batch)
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                # Some peers factorise whatever they get; infinite factors are a divergence too.
                self._end(step, str(error).splitlines()[0])
                return
            if request.timed:
                self.step_s.append(now(request.device) - start)
            elif not math.isfinite(float(loss.detach())):
                self._end(step, "the loss is not finite")
                return
        if not request.timed:
            self._evaluate(request.steps)

    def _evaluate(self, step: int) -> bool:
        """Returns whether the training is over: it diverged, or is as good as was asked."""
        loss = self._task.evaluate(self._model)
        if not math.isfinite(loss):
            self._end(step, "the loss on the fixed set is not finite")
            return True
        self.curve.append((step, loss))
        target = self._request.stop_at
        return target is not None and loss <= target

    def _end(self, step: int, why: str) -> None:
        self.diverged, self.why = step, why


def _share(batch: Batch, rank: int, ranks: int) -> Batch:
    size = len(batch[0]) // ranks
    part = slice(rank * size, (rank + 1) * size)
    return batch[0][part], batch[1][part]


@contextmanager
def _worker(on_its_core: bool, device: str) -> Iterator[Workers]:
    """One worker with one thread, on a device."""
    with pinned(_CORES.worker if on_its_core else None):
        supervisor = Supervisor(
            workers=1,
            devices=(device,),
            threads=1,
            env={"OMP_NUM_THREADS": "1"},
            report=lambda text: None,
        )
        supervisor.__enter__()
    try:
        yield supervisor.endpoints
    finally:
        supervisor.close()


def _await_links(training: Training) -> None:
    """A training of a few seconds would otherwise be over before the worker was met."""
    deadline = time.monotonic() + _PATIENCE_S
    while training.service is not None:
        counts = training.service.metrics()
        if counts["links_up"] == counts["links_total"]:
            return
        if time.monotonic() > deadline:
            raise StateError(f"the worker could not be reached within {_PATIENCE_S:g} s")
        time.sleep(0.002)


def main(arguments: list[str]) -> int:
    """Train as the first argument says and write the result where the second one says."""
    request, target = Request.from_json(arguments[0]), Path(arguments[1])
    torch.set_num_threads(2 if request.hardware == "threads" else 1)
    rank, ranks = int(os.environ.get(RANK_VARIABLE, "0")), 1
    core = None
    if request.timed and request.hardware != "threads":
        core = _CORES.worker if rank else _CORES.training
    with pinned(core):  # before any thread is started
        if request.hardware == "ranks":
            ranks = 2
            meeting = Path(os.environ[MEETING_VARIABLE]).as_uri()
            torch.distributed.init_process_group(
                "gloo", init_method=meeting, rank=rank, world_size=ranks
            )
        result = train(request, rank, ranks)
        if ranks > 1:
            torch.distributed.barrier()  # neither may leave while the other one still reads
            torch.distributed.destroy_process_group()
    if rank == 0:
        target.write_text(json.dumps(result, allow_nan=False), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
