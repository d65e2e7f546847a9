"""A torchrun job in which two ranks train the models one after the other.

Run as a program it is a rank of that job: ``models_job.py FOLDER ENDPOINT NAME...``.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from model_zoo import loss_of, make, share
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrun_job import run_job

from distcurv import KfacConfig, Preconditioner

RANKS, STEPS, DEADLINE = 2, 20, 600.0

# After the first steps the deterministic mode waits for the versions of the worker.
SETTINGS: dict[str, Any] = {
    "rank": 8,
    "damping": 0.01,
    "kl_clip": 0.001,
    "lr": 0.1,
    "preconditioner_upd_interval": 5,
    "curvature_upd_interval": 2,
    "early_steps": 4,
    "install_delay": 4,
    # What a machine may be busy with before either side counts as gone.
    "link_timeout": 60.0,
}


def run(folder: Path, endpoint: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """Run the job; what each rank says of each model, by rank and name.

    Whatever happens, every process of the job has ended afterwards."""
    code, text = run_job(folder, __file__, endpoint, *names, ranks=RANKS, deadline=DEADLINE)
    said = [folder / f"rank{rank}.json" for rank in range(RANKS)]
    assert code is not None, f"the job did not end in time:\n{text}"
    assert all(path.exists() for path in said), f"a rank did not finish:\n{text}"
    return [json.loads(path.read_text()) for path in said]


def checksum(model: nn.Module) -> str:
    """Hash of the parameters' bits."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def train(name: str, endpoint: str) -> dict[str, Any]:
    """This rank's part in the training of one model."""
    rank = dist.get_rank()
    entry = make(name)
    batch = share(entry.batch, rank, RANKS)
    torch.manual_seed(rank)  # dropout differs between ranks
    net = DistributedDataParallel(entry.model)
    optimizer = torch.optim.SGD(net.parameters(), lr=SETTINGS["lr"])
    losses = []
    with Preconditioner(net, KfacConfig(**SETTINGS), workers=[endpoint]) as precond:
        before = checksum(entry.model)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = loss_of(net, batch)
            loss.backward()
            precond.step()
            optimizer.step()
            losses.append(loss.detach())
        log = [list(record) for record in precond.install_log]
        metrics = precond.metrics()
    total = torch.stack(losses)
    dist.all_reduce(total)
    return {
        "losses": (total / RANKS).tolist(),
        "before": before,
        "after": checksum(entry.model),
        "log": log,
        "metrics": metrics,
        "blocks": len(precond.block_names),
    }


def main(folder: Path, endpoint: str, names: Sequence[str]) -> None:
    # A rank that hangs says where, and ends by itself even if nobody is left to end it.
    faulthandler.dump_traceback_later(DEADLINE - 5, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results: dict[str, Any] = {}
    for name in names:
        try:
            results[name] = train(name, endpoint)
        except Exception:  # noqa: BLE001 - told to the test, which judges it
            results[name] = {"raised": traceback.format_exc()}
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
