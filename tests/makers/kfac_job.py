"""A torchrun job in which two ranks take steps with served makers on halves of the batches.

Run as a program it is a rank of that job: ``kfac_job.py FOLDER``.
"""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from batch_makers_job import DEADLINE, RANKS
from maker_models import batch_of, model_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from distcurv.makers import (
    PreconditionedGradientMaker,
    PreconditioningConfig,
    ShampooGradientMaker,
    SoapGradientMaker,
)
from distcurv.makers.kfac import KfacGradientMaker
from distcurv.makers.natural_gradient import NaturalGradientMaker
from distcurv.makers.natural_shapes import (
    DiagNaturalGradientMaker,
    EkfacGradientMaker,
    EmpNaturalGradientMaker,
    FullNaturalGradientMaker,
    LayerWiseNaturalGradientMaker,
    UnitWiseNaturalGradientMaker,
)

STEPS = 3
Maker = Callable[[nn.Module], PreconditionedGradientMaker]


def _config(**settings: Any) -> PreconditioningConfig:
    return PreconditioningConfig(**{"damping": 0.1, "ema_decay": 0.4, **settings})


MAKERS: dict[str, tuple[str, Maker]] = {
    "dense": ("conv", lambda m: KfacGradientMaker(m, _config(), "fisher_emp")),
    "exact": ("mlp", lambda m: KfacGradientMaker(m, _config(), "fisher_exact")),
    "low-rank": ("conv", lambda m: KfacGradientMaker(m, _config(rank=100), "fisher_emp")),
    "eigen": ("mlp", lambda m: KfacGradientMaker(m, _config(), "fisher_emp", eigen=True)),
    "swift": ("conv", lambda m: KfacGradientMaker(m, _config(), "fisher_emp", swift=True)),
    "swift-mlp": (
        "mlp",
        lambda m: KfacGradientMaker(m, _config(ema_decay=None), "fisher_exact", swift=True),
    ),
    # Some blocks on the ranks, others served.
    "swift-tokens": (
        "tokens",
        lambda m: KfacGradientMaker(m, _config(), "fisher_emp", swift=True),
    ),
    "norms": ("tokens", lambda m: KfacGradientMaker(m, _config(), "fisher_emp")),
    "full": ("conv", lambda m: FullNaturalGradientMaker(m, _config(), "fisher_emp")),
    "layer-wise": ("tokens", lambda m: LayerWiseNaturalGradientMaker(m, _config(), "fisher_emp")),
    "unit-wise": ("conv", lambda m: UnitWiseNaturalGradientMaker(m, _config(), "fisher_exact")),
    "diag": ("tokens", lambda m: DiagNaturalGradientMaker(m, _config(), "fisher_emp")),
    "ekfac": ("conv", lambda m: EkfacGradientMaker(m, _config(), "fisher_emp")),
    "emp": ("mlp", lambda m: EmpNaturalGradientMaker(m, _config())),
    "by module": (
        "mlp",
        lambda m: NaturalGradientMaker(m, _config(), "fisher_exact", [("0", "kfe"), "layer_wise"]),
    ),
    "shampoo": ("tokens", lambda m: ShampooGradientMaker(m, _config())),
    # Of low rank: where an eigenvalue is about zero, rounding chooses its direction.
    "soap": ("mlp", lambda m: SoapGradientMaker(m, _config(rank=2), eps=0.1)),
    "draws": ("mlp", lambda m: KfacGradientMaker(m, _config(), seed=1)),
}


def take_steps(
    gm: PreconditionedGradientMaker, called: nn.Module, name: str, part: slice
) -> Tensor:
    """All gradients of some steps on a part of each batch."""
    made = []
    with closing(gm):
        for at in range(STEPS):
            x, t = (whole[part] for whole in batch_of(name, at))
            called.zero_grad()
            y = gm.setup_model_call(called, x)
            gm.setup_loss_call(F.cross_entropy, y.flatten(0, -2), t.flatten())
            gm.forward_and_backward()
            made += [p.grad.flatten() for p in called.parameters() if p.grad is not None]
    return torch.cat(made)


def main(folder: Path) -> None:
    faulthandler.dump_traceback_later(DEADLINE * 0.9, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    said = {}
    for key, (name, maker) in MAKERS.items():
        wrapped = DistributedDataParallel(model_of(name))
        size = len(batch_of(name, 0)[0]) // RANKS
        part = slice(rank * size, (rank + 1) * size)
        said[key] = take_steps(maker(wrapped), wrapped, name, part)
    torch.save(said, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
