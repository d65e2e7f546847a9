"""What each training rank of the demo does: the same training twice, then a result file.

Run by torchrun as ``-m distcurv.demo.train FOLDER SETTINGS``.  Both trainings happen in the same
processes, one after the other, from the same initial weights, over the same batches in the same
order, under the same DistributedDataParallel; only the optimizer differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distcurv.demo.progress import ProgressWriter, Snapshot
from distcurv.demo.settings import DemoSettings
from distcurv.observe.events import Events, from_environment
from distcurv.optim import LowRankSOAP

METHODS = ("baseline", "distcurv")
BETAS = (0.9, 0.95)
CONNECT_PATIENCE_S = 15.0


def progress_path(folder: Path, rank: int) -> Path:
    """Where a rank says how far it is."""
    return folder / f"progress{rank}.jsonl"


def result_path(folder: Path, rank: int) -> Path:
    """Where a rank leaves its result."""
    return folder / f"result{rank}.json"


@dataclass
class Outcome:
    """One training on one rank.

    Attributes:
        losses: of the global batch before each step's update.
        step_ms: wall time of each step on this rank: batch, forward, backward with the reduction
            of gradients, optimizer step; what is only there to watch the run is not in it.
        final_loss: of the task's evaluation after the last step.
        checksum: SHA-256 over the bytes of all parameters after the last step.
        install_log: (step, block, version, folded_from, folded_through), empty for the baseline.
        block_names: names of the blocks by the numbers in ``install_log``.
        metrics: the optimizer's metrics after the last step, empty for the baseline.
    """

    losses: list[float]
    step_ms: list[float]
    final_loss: float
    checksum: str
    install_log: list[tuple[int, ...]]
    block_names: list[str]
    metrics: dict[str, float | int]


def checksum(model: nn.Module) -> str:
    """SHA-256 over all parameters' bytes, in the order of their names in the model."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def make_optimizer(method: str, model: nn.Module, settings: DemoSettings) -> torch.optim.Optimizer:
    """The optimizer of a method, with the task's tuned learning rate."""
    task = settings.problem
    if method == "baseline":
        return torch.optim.AdamW(
            model.parameters(), lr=task.baseline_lr, betas=BETAS, weight_decay=task.weight_decay
        )
    return LowRankSOAP(
        model,
        lr=task.distcurv_lr,
        betas=BETAS,
        weight_decay=task.weight_decay,
        rank=settings.rank,
        workers="auto" if settings.workers else "inline",
        install_delay=settings.install_delay,
        seed=settings.seed,
    )


def train(method: str, settings: DemoSettings, emit: Events, progress: ProgressWriter) -> Outcome:
    """Train once; all ranks call it together."""
    task, steps = settings.problem, settings.resolved_steps
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = task.build(settings.seed)
    ddp = DistributedDataParallel(model)
    optimizer = make_optimizer(method, model, settings)
    soap = optimizer if isinstance(optimizer, LowRankSOAP) else None
    try:
        if soap is not None:
            await_links(soap.metrics, CONNECT_PATIENCE_S)
        task.batches(0, rank, ranks, settings.seed)  # the first call reads the data
        dist.barrier()
        losses: list[float] = []
        step_ms: list[float] = []
        reported = 0
        for step in range(steps):
            t0 = time.monotonic_ns()
            batch = task.batches(step, rank, ranks, settings.seed)
            optimizer.zero_grad(set_to_none=True)
            loss = task.loss(ddp, batch)
            loss.backward()
            optimizer.step()
            t1 = time.monotonic_ns()
            losses.append(loss.item())
            step_ms.append((t1 - t0) / 1e6)
            emit("step", step=step, t0=t0, t1=t1, method=method, loss=losses[-1])
            if progress.due() or step + 1 == steps:
                progress.write(_snapshot(method, losses, step_ms, reported, soap))
                reported = len(losses)
        return Outcome(
            losses=_mean_over_ranks(losses),
            step_ms=step_ms,
            final_loss=task.evaluate(model),
            checksum=checksum(model),
            install_log=[] if soap is None else [tuple(entry) for entry in soap.install_log],
            block_names=[] if soap is None else soap.block_names,
            metrics={} if soap is None else soap.metrics(),
        )
    finally:
        if soap is not None:
            soap.close()


def await_links(metrics: Callable[[], Mapping[str, float | int]], patience: float) -> None:
    """Return when this rank's sessions with the workers are open, or after ``patience`` seconds.

    A training of a few seconds would otherwise be over before the workers were met.  ``metrics``
    is an optimizer's or a maker's method of this name."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        now = metrics()
        if now["links_up"] == now["links_total"]:
            return
        time.sleep(0.01)


def _snapshot(
    method: str,
    losses: Sequence[float],
    step_ms: Sequence[float],
    reported: int,
    soap: LowRankSOAP | None,
) -> Snapshot:
    recent = len(losses) - reported
    counts: dict[str, Any] = {}
    if soap is not None:
        now = soap.metrics()
        counts = {
            "version": int(now["version"]),
            "staleness": int(now["staleness"]) if now["versions_installed"] else 0,
            "busy": float(now["worker_busy"]),
            "bytes": int(now["bytes_to_workers"] + now["bytes_from_workers"]),
            "links_up": int(now["links_up"]),
            "links_total": int(now["links_total"]),
        }
    return Snapshot(
        method=method,
        step=len(losses),
        loss=sum(losses[reported:]) / recent,
        step_ms=sum(step_ms[reported:]) / recent,
        t=time.monotonic(),
        **counts,
    )


def _mean_over_ranks(losses: Sequence[float]) -> list[float]:
    """Every rank has an equal share of the batch, so the mean is the global batch's loss."""
    joined = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(joined)
    mean: list[float] = (joined / dist.get_world_size()).tolist()
    return mean


def main(argv: Sequence[str]) -> int:
    """Train with both methods and write this rank's result."""
    folder, settings = Path(argv[0]), DemoSettings.from_json(argv[1])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    emit = from_environment(f"rank{rank}")
    progress = ProgressWriter(progress_path(folder, rank))
    outcomes = {method: train(method, settings, emit, progress) for method in METHODS}
    progress.close()
    result = {
        "rank": rank,
        "pid": os.getpid(),
        "methods": {method: vars(outcome) for method, outcome in outcomes.items()},
    }
    result_path(folder, rank).write_text(json.dumps(result), encoding="utf-8")
    emit.close()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
