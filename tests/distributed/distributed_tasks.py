"""The tiny training runs of the distributed tests: the same model and data on any number of ranks.

A step's batch is made from the step's number; with N ranks each takes an N-th of its rows, so that
the mean over ranks is the mean over the joined batch.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distcurv import KfacConfig, LowRankSOAP, Preconditioner

ROWS = 16
DIMS = (6, 12, 9, 3)
EQUAL_STEPS = 12  # after which ranks are compared with one rank

# What the doors are called in the tests, and how each is opened.
DOORS: dict[str, dict[str, Any]] = {
    "kfac": {"rank": 4},
    "kfac-dense": {"kind": "dense"},
    # eps: the first basis diagonalises the first gradient, so most entries of its core are rounding
    # noise; with the default eps the first step makes +-lr of it, differently for every summation.
    # rank: where an eigenvalue is at the tail its direction is arbitrary; 2 stays clear of that.
    "soap": {"rank": 2, "eps": 1e-3},
    "soap-activations": {"rank": 2, "source": "activations", "eps": 1e-3},
    "soap-full": {"rank": 12, "eps": 1e-3},
}


def make_model(dims: tuple[int, ...] = DIMS, seed: int = 0) -> nn.Sequential:
    """Linear layers with tanh between them; the weights follow from the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for i, (d_in, d_out) in enumerate(pairwise(dims)):
            layers += [nn.Tanh()] if i else []
            layers.append(nn.Linear(d_in, d_out))
        return nn.Sequential(*layers)


def make_batch(step: int, dims: tuple[int, ...] = DIMS, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Inputs and targets [rows, d] of a step."""
    generator = torch.Generator().manual_seed(10_000 + step)
    scales = torch.linspace(0.3, 2.0, dims[0])
    x = torch.randn(rows, dims[0], generator=generator) * scales
    return x, torch.sin(x[:, : dims[-1]] * 2) + 0.1


# The run whose state_dict another number of ranks goes on from: saved at the step at which what the
# last closed window made is installed, so that nothing is under way that the state_dict leaves out.
SAVED_SETTINGS: dict[str, Any] = {
    "preconditioner_upd_interval": 5,
    "curvature_upd_interval": 1,
    "early_steps": 10,
    "install_delay": 0,
    # Where a worker serves: no busy machine makes it count as gone.
    "link_timeout": 60.0,
}
SAVED_AT = 21


class Run:
    """One training run on this rank: model (under DDP where there are several ranks), a door, and
    for the door ``kfac`` SGD as the base optimizer."""

    def __init__(
        self,
        door: str,
        workers: Any = "inline",
        *,
        lr: float = 0.01,
        dims: tuple[int, ...] = DIMS,
        replay: Any = None,
        start_step: int = 0,
        **settings: Any,
    ) -> None:
        self.dims = dims
        self.step_count = start_step
        self.model = make_model(dims)
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.net: nn.Module = self.model
        if self.ranks > 1:
            self.net = DistributedDataParallel(self.model)
        settings = {**DOORS[door], **settings}
        self.base: torch.optim.Optimizer | None = None
        self.door: Preconditioner | LowRankSOAP
        if door.startswith("kfac"):
            self.base = torch.optim.SGD(self.net.parameters(), lr=lr)
            config = KfacConfig(**{"damping": 0.1, **settings})
            self.door = Preconditioner(self.net, config, workers, replay=replay)
        else:
            self.door = LowRankSOAP(self.net, lr=lr, workers=workers, replay=replay, **settings)

    def backward(self) -> float:
        """Forward and backward on this rank's share of the coming step's batch."""
        rows = ROWS // self.ranks
        x, y = (t[self.rank * rows :][:rows] for t in make_batch(self.step_count, self.dims))
        self.model.zero_grad(set_to_none=True)
        loss = F.mse_loss(self.net(x), y)
        loss.backward()
        self.step_count += 1
        return loss.item()

    def update(self) -> None:
        """What follows a backward: the door's step, and the base optimizer's."""
        self.door.step()
        if self.base is not None:
            self.base.step()

    def steps(self, number: int) -> float:
        """Train; returns the last loss."""
        loss = 0.0
        for _ in range(number):
            loss = self.backward()
            self.update()
        return loss

    def grads(self) -> list[Tensor]:
        return [p.grad.clone() for p in self.model.parameters() if p.grad is not None]

    def params(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def checksum(self) -> str:
        """Hash of the parameters' bits."""
        return checksum(self.params())

    def metrics(self) -> dict[str, float | int]:
        return self.door.metrics()

    def versions(self) -> dict[str, dict[str, Tensor]]:
        """The installed tensors by block name (copies)."""
        pipeline = self.door._pipeline
        assert pipeline is not None
        return {
            spec.name.removeprefix("module."): {k: v.clone() for k, v in i.tensors.items()}
            for spec, i in zip(pipeline.table.specs, pipeline.installed, strict=True)
        }

    def close(self) -> None:
        self.door.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def checksum(tensors: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def observed_all_accounted(metrics: dict[str, float | int]) -> bool:
    """After close(): what was folded and what was dropped is what was observed."""
    folded, dropped = metrics["statistics_folded"], metrics["statistics_dropped"]
    return metrics["statistics_observed"] == folded + dropped
