"""A torchrun job: two ranks train with the quasi-Newton makers, each on its half of the batches.

Run as a program it is a rank of that job: ``quasi_newton_ranks.py FOLDER``.
"""

from __future__ import annotations

import copy
import faulthandler
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from quasi_newton_models import make_batch, make_model, move, one_step
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrun_job import run_job

from distcurv.makers import (
    KronBfgsGradientMaker,
    KronPsgdGradientMaker,
    PreconditionedGradientMaker,
    PreconditioningConfig,
    PsgdGradientMaker,
)

RANKS, STEPS, DEADLINE = 2, 6, 400.0
CONFIG = PreconditioningConfig(damping=0.1, ema_decay=0.4, preconditioner_upd_interval=2)

Maker = Callable[[nn.Module], PreconditionedGradientMaker]
MAKERS: dict[str, Maker] = {
    "psgd": lambda model: PsgdGradientMaker(model, CONFIG, precond_lr=0.1),
    "kron-psgd": lambda model: KronPsgdGradientMaker(model, CONFIG, precond_lr=0.1),
    "kron-bfgs": lambda model: KronBfgsGradientMaker(model, CONFIG),
    "kron-bfgs-minibatch": lambda model: KronBfgsGradientMaker(model, CONFIG, True),
}
CASES = [(kind, name) for kind in MAKERS for name in ("mlp", "conv", "tokens")]


def make(name: str) -> nn.Module:
    """Without BatchNorm, whose ranks normalise on their own."""
    model = make_model(name)
    if name == "conv":
        model[1] = nn.Identity()  # type: ignore[operator]
    return model


def trained(kind: str, name: str, rank: int, ranks: int, resume: bool = False) -> dict[str, Any]:
    """Parameters and state after some steps; with ``resume`` in the middle by a saved state."""
    bare = make(name)
    model = DistributedDataParallel(bare) if ranks > 1 else bare
    gm = MAKERS[kind](model)
    for step in range(STEPS):
        if resume and step == 3:  # right after an update
            saved = copy.deepcopy(gm.state_dict())
            gm = MAKERS[kind](model)
            gm.load_state_dict(saved)
        x, t = make_batch(name, 100 + step)
        own = [part.chunk(ranks)[rank] for part in (x, t)]
        one_step(gm, model, (own[0], own[1]))
        move(bare)
    state = {f"state.{k}": torch.as_tensor(v) for k, v in gm.state.items()}
    return state | {k: p.detach() for k, p in bare.named_parameters()}


def run(folder: Path) -> list[dict[str, Any]]:
    """Run the job: by rank, what `trained` returned by "kind/name" and "kind/name/resumed".

    Whatever happens, every process of the job has ended afterwards."""
    code, text = run_job(folder, __file__, ranks=RANKS, deadline=DEADLINE)
    assert code == 0, f"the job ended with {code}\n{text}"
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)]


def main(folder: Path) -> None:
    faulthandler.dump_traceback_later(DEADLINE - 5, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {}
    for kind, name in CASES:
        found[f"{kind}/{name}"] = trained(kind, name, rank, RANKS)
        if name == "mlp":
            found[f"{kind}/{name}/resumed"] = trained(kind, name, rank, RANKS, resume=True)
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
