"""Runs refresh calls: gathers a batch, calls the kind, checks what would be published.

Everything that a job holds is first copied into new, aligned, contiguous tensors: matrix
products may round differently on unaligned views, and what came over a socket must give the
same bits as what was handed over in memory.

Shape letters: B blocks of a job.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distcurv.curvature.kinds import KINDS
from distcurv.curvature.narrow import Sent, as_received, split
from distcurv.curvature.spec import BlockSpec, Tensors
from distcurv.errors import ConfigError, NumericsError, ShapeError
from distcurv.worker.jobs import Failed, Folded, Item, Job, Outcome

log = logging.getLogger("distcurv.worker")

# What may go wrong with one batch and not with the next; anything else ends the worker.
REFRESH_ERRORS = (NumericsError, ShapeError, torch.OutOfMemoryError)


class Computer:
    """Folds statistics on one device.  Raises `ConfigError` when the device is not there."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            if (self.device.index or 0) >= count:
                raise ConfigError(
                    f"worker device {device!r}: this machine has {count} CUDA devices"
                )
            self._stream = torch.cuda.Stream(self.device)

    def run(self, job: Job) -> Outcome:
        """The results of a job, in the order of its items."""
        t0 = time.monotonic_ns()
        with torch.no_grad():
            if self._stream is None:
                results = self._refresh_all(job)
            else:
                with torch.cuda.stream(self._stream):
                    results = self._refresh_all(job)
                self._stream.synchronize()
        return Outcome(tuple(results), t0, time.monotonic_ns())

    def _refresh_all(self, job: Job) -> list[Folded | Failed]:
        """One call for all; when that fails one call each, so that good blocks go on."""
        try:
            return self._refresh(job.spec, job.items)
        except REFRESH_ERRORS as error:
            if len(job.items) == 1:
                return [Failed(f"{type(error).__name__}: {error}")]
            log.warning("refresh of %d blocks failed, trying singly: %s", len(job.items), error)
        results: list[Folded | Failed] = []
        for item in job.items:
            try:
                results += self._refresh(job.spec, [item])
            except REFRESH_ERRORS as error:
                results.append(Failed(f"{type(error).__name__}: {error}"))
        return results

    def _refresh(self, spec: BlockSpec, items: Sequence[Item]) -> list[Folded | Failed]:
        kind = KINDS[spec.kind]
        layout = kind.published_layout(spec)
        statistics = kind.statistic_layout(spec)
        refreshed = kind.refresh(
            spec,
            self._gather([self._state(spec, item) for item in items]),
            self._gather([statistics.views(item.statistic) for item in items]),
            self._gather([layout.views(item.basis) for item in items]),
        )
        published, state = layout.pack(refreshed.published), refreshed.state
        sent: list[Sent] = []
        if layout.narrow:
            sent = [split([layout], one) for one in published]
            # What the owner has of it is what this worker goes on from, as after a seed.
            published = torch.stack([as_received(layout, one) for one in sent])
            state = kind.seed(spec, layout.views(published))
            sent = [Sent(one.payload.cpu(), one.narrow.cpu()) for one in sent]
        published = published.cpu()
        faults = {
            "the preconditioner": _non_finite([published]),
            "the state": _non_finite(list(state.values())),
            "the residual": _non_finite([refreshed.uncaptured, refreshed.innovation]),
        }
        uncaptured = refreshed.uncaptured.tolist()
        innovation = refreshed.innovation.tolist()
        results: list[Folded | Failed] = []
        for index, item in enumerate(items):
            bad = [what for what, where in faults.items() if where[index]]
            if bad:
                results.append(Failed(f"{' and '.join(bad)} of {item.name} came out non-finite"))
                continue
            # Copies of their own: a view would keep the whole batch alive.
            own = {key: value[index].clone() for key, value in state.items()}
            flat = published[index].clone()
            travels = sent[index] if sent else split([layout], flat)
            results.append(Folded(own, travels, flat, uncaptured[index], innovation[index]))
        return results

    def _state(self, spec: BlockSpec, item: Item) -> Tensors:
        """The block's state; made from its newest version the first time after a seed.

        That is done one by one, so that it does not depend on which blocks come together."""
        if item.state is not None:
            return item.state
        kind = KINDS[spec.kind]
        newest = self._gather([kind.published_layout(spec).views(item.newest)])
        return {name: value[0] for name, value in kind.seed(spec, newest).items()}

    def _gather(self, parts: Sequence[Tensors]) -> Tensors:
        """[B, ...] by name on the device, in memory of its own."""
        return {
            name: torch.stack([part[name] for part in parts]).to(self.device) for name in parts[0]
        }


def _non_finite(values: Sequence[Tensor]) -> list[bool]:
    """Which of the B blocks has an infinite or undefined number in any of ``values`` [B, ...]."""
    finite = [torch.isfinite(value).reshape(len(value), -1).all(1) for value in values]
    return [not good for good in torch.stack(finite).all(0).tolist()]


class ComputeThread:
    """One daemon thread that runs one job at a time; ``wake`` is called when one is done."""

    def __init__(self, computer: Computer, wake: Callable[[], None], name: str) -> None:
        self._computer = computer
        self._wake = wake
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[Job, Outcome | Exception]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"{name}-compute", daemon=True)
        self.busy = False

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Start a job; the one before must have been collected."""
        if self.busy:
            raise AssertionError(f"job {job.ticket} was submitted while another is computed")
        self.busy = True
        self._jobs.put(job)

    def collect(self) -> tuple[Job, Outcome] | None:
        """The job that is done, if one is.  Raises what its computation raised."""
        try:
            job, outcome = self._done.get_nowait()
        except queue.Empty:
            return None
        self.busy = False
        if isinstance(outcome, Exception):
            raise outcome
        return job, outcome

    def close(self) -> None:
        """End the thread; waits for the job under way, so that nothing is woken afterwards."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            outcome: Outcome | Exception
            try:
                outcome = self._computer.run(job)
            except Exception as error:  # noqa: BLE001 - `collect` raises it in the poll loop
                outcome = error
            self._done.put((job, outcome))
            del job, outcome  # a thread that waits keeps nothing of them
            self._wake()
