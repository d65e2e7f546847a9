"""Scenarios of `distributed_ranks` about settings that are functions of the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from distributed_tasks import Run

from distcurv.errors import MismatchError

Result = dict[str, Any]


def scheduled(save: Callable[[Any], None], steps: int) -> Result:
    """A run whose windows grow and whose damping falls; and what the summary says of its blocks."""
    settings: Result = {
        "preconditioner_upd_interval": lambda step: 2 if step < 12 else 5,
        "damping": lambda step: 0.1 / (1 + step),
        "early_steps": 4,
    }
    with Run("kfac", **settings) as run:
        run.steps(steps)
        rows = run.door.summary().rows
        log = [list(record) for record in run.door.install_log]
    blocks = {row.block.name: row.block for row in rows if row.block is not None}
    served = {name: [block.owner, block.worker] for name, block in blocks.items()}
    return {"log": log, "checksum": run.checksum(), "served": served}


def other_schedule(save: Callable[[Any], None], setting: str) -> Result:
    """From step 6 on the last rank's function of the step gives another value."""
    last = dist.get_rank() == dist.get_world_size() - 1
    base = {"damping": 0.1, "preconditioner_upd_interval": 5, "short": 2, "statistics_at": 0}[
        setting
    ]

    def value(step: int) -> float:
        other = last and step >= 6
        return step % 3 == other if setting == "statistics_at" else base + other

    field = "preconditioner_upd_interval" if setting == "short" else setting
    settings: Result = {"early_steps": 0, "preconditioner_upd_interval": 4, field: value}
    with Run("kfac", **settings) as run:
        try:
            run.steps(30)
        except MismatchError as error:
            return {"at": run.step_count, "text": str(error)}
    return {"at": None}


SCHEDULE_FUNCTIONS = (scheduled, other_schedule)
