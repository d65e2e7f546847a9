"""What the ranks of a test job do: one function per scenario, its result as JSON.

Run by torchrun (see `distributed_jobs.run_ranks`).  A scenario that raises is written down with the
name of its error, and the next one is run.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from distributed_fsdp import FSDP_FUNCTIONS
from distributed_links import DelayedLink, wrapped_links
from distributed_loops import empty_batches, loop_row, overflowed_step
from distributed_makers import MAKER_FUNCTIONS
from distributed_schedules import SCHEDULE_FUNCTIONS
from distributed_tasks import DOORS, Run, observed_all_accounted

from distcurv import wiring
from distcurv.curvature.spec import BlockSpec, SideSpec
from distcurv.train.cores import Cores
from distcurv.train.group import RankGroup
from distcurv.train.placement import Load

Result = dict[str, Any]

MOST_STEPS = 4000  # of a run that waits for its workers; a step takes a few milliseconds


def equal_preconditioner(save: Callable[[Any], None], door: str, steps: int) -> Result:
    """Train a little, then take what is installed and what it makes of the next gradients."""
    settings: Result = {
        "preconditioner_upd_interval": 2,
        "curvature_upd_interval": 1,
        "early_steps": 8,
        # A second step on the first basis would follow what rounding chose beside one gradient.
        "early_interval": 1,
        "install_delay": 0,
    }
    with Run(door, **settings) as run:
        run.steps(steps)
        run.backward()
        before = run.params()
        grads = run.grads()
        run.update()
        moved = [a - b for a, b in zip(before, run.params(), strict=True)]
        save({"versions": run.versions(), "grads": grads, "moved": moved, "params": run.params()})
        log = [list(record) for record in run.door.install_log]
    return {"log": log, "checksum": run.checksum()}


def fewest_from_workers(run: Run) -> int:
    """Versions that workers have made so far, of the rank that has the fewest: equal on all."""
    fewest = torch.tensor(run.metrics()["versions_from_workers"])
    dist.all_reduce(fewest, op=dist.ReduceOp.MIN)
    return int(fewest)


def delayed_links(
    save: Callable[[Any], None], door: str, endpoints: list[str], versions: int, seed: int
) -> Result:
    """A run whose link on each rank delays every message at random, then its replay.

    It trains until ``versions`` have come from workers to each rank, however slow they are."""

    def wrap(link: Any, rank: int) -> Any:
        return DelayedLink(link, 1000 * seed + rank, 0.01)

    settings: Result = {
        "preconditioner_upd_interval": 5,
        "curvature_upd_interval": 1,
        "early_steps": 10,
        "link_timeout": 30.0,
    }
    with wrapped_links(wrap), Run(door, endpoints, **settings) as run:
        steps = 0
        while steps < MOST_STEPS and fewest_from_workers(run) < versions:
            run.steps(20)
            steps += 20
    log = [list(record) for record in run.door.install_log]
    with Run(door, "inline", replay=log, **settings) as again:
        again.steps(steps)
    return {
        "log": log,
        "checksum": run.checksum(),
        "metrics": run.metrics(),
        "accounted": observed_all_accounted(run.metrics()),
        "replayed_log": [list(record) for record in again.door.install_log],
        "replayed_checksum": again.checksum(),
    }


def skipped_step(
    save: Callable[[Any], None], door: str, at: int, steps: int, settings: Result
) -> Result:
    """Rank 1 leaves out one step() of the door; DDP's reductions go on."""
    in_vain = False  # whether the next wait may be the one for the step() that is left out
    arrived = RankGroup.arrived

    def impatient(group: RankGroup, work: dist.Work | None, timeout: float) -> bool:
        """Waits as ever for a rank that is slow, and a moment for one that does not come."""
        nonlocal in_vain
        come = arrived(group, work, 1.5 if in_vain else timeout)
        in_vain = in_vain and come
        return come

    with Run(door, **settings) as run, patch.object(RankGroup, "arrived", impatient):
        for step in range(steps):
            run.backward()
            if step == at:
                in_vain = run.rank == 0
                if run.rank == 1:
                    continue
            run.update()
    return {}


def other_table(save: Callable[[Any], None], door: str) -> Result:
    """The last rank has a model with another hidden width."""
    rank = dist.get_rank()
    width = 13 if rank == dist.get_world_size() - 1 else 12
    model = torch.nn.Sequential(torch.nn.Linear(6, width), torch.nn.Linear(width, 3))
    return _open(door, model)


def other_config(save: Callable[[Any], None], door: str) -> Result:
    """The last rank has another interval."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 3))
    last = dist.get_rank() == dist.get_world_size() - 1
    return _open(door, model, preconditioner_upd_interval=12 if last else 10)


def other_workers(save: Callable[[Any], None], door: str) -> Result:
    """The last rank is told of a worker that the others do not know."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 3))
    last = dist.get_rank() == dist.get_world_size() - 1
    return _open(door, model, workers=["tcp://127.0.0.1:9"] if last else "inline")


def other_endpoints(save: Callable[[Any], None], door: str) -> Result:
    """All say ``auto``; the last rank's environment names a worker, the others have to decide."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 3))
    if dist.get_rank() == dist.get_world_size() - 1:
        os.environ[wiring.ENDPOINTS_VARIABLE] = "tcp://127.0.0.1:9"
    try:
        return _open(door, model, workers="auto")
    finally:
        os.environ.pop(wiring.ENDPOINTS_VARIABLE, None)


def decided_alike(save: Callable[[Any], None], cores: list[int]) -> Result:
    """Each rank sees another number of cores; does ``auto`` start workers?"""
    side = SideSpec(4096, 4096, "none", "dense")
    heavy = Load((BlockSpec("heavy", "dense", (side, side), 0.9, 1e-3),), (0,), 1)
    own = Cores(frozenset(range(cores[dist.get_rank()])), 100)
    nothing_started: tuple[list[str], Callable[[], None]] = ([], lambda: None)
    with (
        patch.object(wiring, "own_cores", return_value=own),
        patch.object(wiring, "_spawn_one_per_node", return_value=nothing_started) as spawn,
    ):
        wiring.owner_links("auto", RankGroup(torch.device("cpu")), heavy).close()
    return {"starts": spawn.called}


def _open(door: str, model: torch.nn.Module, workers: Any = "inline", **settings: Any) -> Result:
    from distcurv import KfacConfig, LowRankSOAP, Preconditioner

    settings = {**DOORS[door], **settings}
    if door.startswith("kfac"):
        Preconditioner(model, KfacConfig(**settings), workers).close()
    else:
        LowRankSOAP(model, workers=workers, **settings).close()
    return {}


def checkpointed(save: Callable[[Any], None], door: str, steps: int, settings: Result) -> Result:
    """Train, save each rank's state_dict, train on."""
    with Run(door, **settings) as run:
        run.steps(steps)
        state = {
            "model": run.model.state_dict(),
            "door": run.door.state_dict(),
            "base": run.base.state_dict() if run.base is not None else {},
            "log": [list(record) for record in run.door.install_log],
        }
        save(state)
        run.steps(2 * settings["preconditioner_upd_interval"])
    return {"checksum": run.checksum(), "log": [list(r) for r in run.door.install_log]}


SCENARIOS: dict[str, Callable[..., Result]] = {
    function.__name__: function
    for function in (
        equal_preconditioner,
        delayed_links,
        skipped_step,
        other_table,
        other_config,
        other_workers,
        other_endpoints,
        decided_alike,
        checkpointed,
        loop_row,
        overflowed_step,
        empty_batches,
        *FSDP_FUNCTIONS,
        *SCHEDULE_FUNCTIONS,
        *MAKER_FUNCTIONS,
    )
}


def main(folder: Path, deadline: float) -> None:
    # A rank that hangs says where, and ends by itself even if nobody is left to end it.
    faulthandler.dump_traceback_later(deadline - 5, exit=True)
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    results: dict[str, Result] = {}
    for key, ranks, name, arguments in json.loads((folder / "scenarios.json").read_text()):
        if rank < ranks:
            print(f"rank {rank}: {key}", flush=True)
            results[key] = run_scenario(folder, key, rank, ranks, name, arguments)
            partial = folder / f"rank{rank}.partial"
            partial.write_text(json.dumps(results))
            os.replace(partial, folder / f"rank{rank}.json")


def run_scenario(
    folder: Path, key: str, rank: int, ranks: int, name: str, arguments: Result
) -> Result:
    """One scenario in a process group of its own, of the first ``ranks`` ranks."""

    def save(value: Any) -> None:
        torch.save(value, folder / f"{key}.rank{rank}.pt")

    store = dist.FileStore(str(folder / f"{key}.store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    try:
        result = SCENARIOS[name](save, **arguments)
    except Exception as error:  # noqa: BLE001 - told to the test, which judges it
        result = {
            "raised": type(error).__name__,
            "text": str(error),
            "trace": traceback.format_exc(),
        }
    # A rank that raised must not close connections under those that are about to.
    store.add("ended", 1)
    while store.add("ended", 0) < ranks:
        time.sleep(0.01)
    dist.destroy_process_group()
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
