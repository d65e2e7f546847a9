"""A torchrun job in which two ranks take steps with the makers of `batch_makers`.

Run as a program it is a rank of that job: ``batch_makers_job.py FOLDER``.
"""

from __future__ import annotations

import faulthandler
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from batch_makers import DAMPING, DEFINITIONS, MODELS, gradient_of, make, setup, step_of
from dense_derivatives import flat, trained
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrun_job import run_job

from distcurv.makers import GradientMaker
from distcurv.makers.preconditioning_config import PreconditioningConfig
from distcurv.makers.seng import SengGradientMaker

LENGTHS = (4, 2)  # positions of the ranks' samples
RANKS, STEPS, DEADLINE = 2, 4, 400.0
UNEVEN = (4, 2)  # samples of the ranks


def run(folder: Path, program: str = __file__) -> list[dict[str, Any]]:
    """Run a job, by default this one; what each rank saved.

    Whatever happens, all its processes have ended then."""
    code, text = run_job(folder, program, ranks=RANKS, deadline=DEADLINE)
    saved = [folder / f"rank{rank}.pt" for rank in range(RANKS)]
    assert code is not None, f"the job did not end in time:\n{text}"
    assert all(path.exists() for path in saved), f"a rank did not finish:\n{text}"
    return [torch.load(path, weights_only=True) for path in saved]


def steps(gm: Any, model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """The parameters after some steps on batches that differ."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for step in range(STEPS):
        # Token numbers stay what they are.
        step_of(gm, model, x if x.dtype == torch.long else x * (1 + 0.1 * step), t)
        optimizer.step()
    return flat(trained(model)).detach().clone()


def settings(name: str) -> dict[str, Any]:
    """With old curvature at every second step, for those that keep it."""
    return {"preconditioner_upd_interval": 2} if name in ("newton", "seng") else {}


def wrapped(name: str) -> tuple[DistributedDataParallel, Tensor, Tensor]:
    model, x, t = make(name)
    return DistributedDataParallel(model), x, t


def sketched(model: nn.Module) -> SengGradientMaker:
    return SengGradientMaker(model, PreconditioningConfig(damping=DAMPING), 2, 1)


class Sometimes(nn.Module):
    """Positions [N, T, 4]; short ones leave a layer out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.extra = nn.Linear(5, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if x.shape[1] > min(LENGTHS):
            h = torch.tanh(self.extra(h))
        out: Tensor = self.last(h)
        return out


def sometimes() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """The model, and the batch of each rank."""
    torch.manual_seed(5)
    model = Sometimes()
    return model, [(torch.randn(3, T, 4), torch.randint(0, 3, (3, T))) for T in LENGTHS]


def results(rank: int) -> dict[str, Tensor]:
    """What this rank finds, by name of the run."""
    found: dict[str, Tensor] = {}
    share = slice(rank, None, RANKS)
    for model_name in MODELS:
        for name, (maker, _) in DEFINITIONS.items():
            ddp, x, t = wrapped(model_name)
            gm = maker(ddp, **settings(name))
            found[f"{name} {model_name}"] = steps(gm, ddp.module, x[share], t[share])
    ddp, x, t = wrapped("conv")
    found["sketched"] = steps(sketched(ddp), ddp.module, x[share], t[share])

    parts = x.split(UNEVEN), t.split(UNEVEN)
    for name in ("smw", "seng"):
        ddp, _, _ = wrapped("conv")
        gm = DEFINITIONS[name][0](ddp)
        found[f"{name} uneven"] = step_of(gm, ddp.module, parts[0][rank], parts[1][rank])
    bare, batches = sometimes()
    ddp = DistributedDataParallel(bare, find_unused_parameters=True)
    found["seng lengths"] = step_of(DEFINITIONS["seng"][0](ddp), bare, *batches[rank])
    for name, (maker, _) in DEFINITIONS.items():
        # The maker has the bare model; or the wrapper, and a function that calls it.
        for way in ("bare", "method"):
            ddp, x, t = wrapped("mlp")
            gm = maker(ddp.module)
            setup(gm, ddp if way == "bare" else ddp.forward, x[share], t[share])
            gm.forward_and_backward()
            found[f"{name} {way}"] = gradient_of(ddp.module)
        ddp, x, t = wrapped("mlp")
        gm = maker(ddp)
        setup(gm, lambda batch, ddp=ddp: ddp(batch), x[share], t[share])
        gm.forward_and_backward()
        found[f"{name} function"] = gradient_of(ddp.module)

    # The plain gradient is averaged by the wrapper, also after derivatives that it must not see.
    ddp, x, t = wrapped("mlp")
    plain = GradientMaker(ddp)
    for _ in range(2):
        ddp.zero_grad()
        plain.setup_loss_repr(plain.setup_model_call(ddp, x[share]).square().mean())
        plain.loss_hessian()
        plain.forward_and_backward()
    found["plain"] = gradient_of(ddp.module)
    return found


def main(folder: Path) -> None:
    # A rank that hangs says where, and ends by itself even if nobody is left to end it.
    faulthandler.dump_traceback_later(DEADLINE - 5, exit=True)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo")
    torch.save(results(dist.get_rank()), folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
