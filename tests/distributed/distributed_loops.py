"""The ways to write a training loop that the loop matrix is made of, run by a test job's ranks.

A row's run trains on four batches in turn; with accumulation each rank's share of a batch comes in
micro-batches of equal size.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_tasks import DIMS, DOORS, ROWS, checksum, make_batch, make_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from distcurv import KfacConfig, LowRankSOAP, Preconditioner
from distcurv.train.discover import bare_model

STEPS = 24
BATCHES = 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SETTINGS: dict[str, Any] = {
    "preconditioner_upd_interval": 4,
    "curvature_upd_interval": 2,
    "early_steps": 8,
    "early_interval": 2,
    "install_delay": 0,
}


class Row(NamedTuple):
    """One loop."""

    wrapper: str
    precision: str
    accumulation: int
    checkpointing: bool

    @property
    def key(self) -> str:
        return "-".join(map(str, self))


# Every two settings of two columns meet in at least one row.
MATRIX = (
    Row("ddp", "fp32", 1, False),
    Row("fsdp2", "fp32", 4, True),
    Row("ddp", "bf16", 4, True),
    Row("fsdp2", "bf16", 1, False),
    Row("ddp", "fp16", 1, True),
    Row("fsdp2", "fp16", 4, False),
)
COLUMNS: tuple[tuple[Any, ...], ...] = (
    ("ddp", "fsdp2"),
    ("fp32", "bf16", "fp16"),
    (1, 4),
    (False, True),
)
LOOP_DOORS = ("kfac", "soap", "soap-activations")


class Net(nn.Module):
    """The layers of `make_model`, each of them checkpointed if asked for."""

    def __init__(self, *, checkpointing: bool) -> None:
        super().__init__()
        self.layers = make_model(DIMS)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x)
        return x


class Loop:
    """One row's training with one door."""

    def __init__(self, door: str, row: Row) -> None:
        self.row = row
        self.ranks, self.rank = dist.get_world_size(), dist.get_rank()
        self.net: Any = Net(checkpointing=row.checkpointing)
        if row.wrapper == "ddp":
            self.net = DistributedDataParallel(self.net)
        else:
            mesh = init_device_mesh("cpu", (self.ranks,))
            for layer in self.net.layers:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)
        self.scaler = torch.amp.GradScaler(
            "cpu", init_scale=2.0**10, enabled=row.precision == "fp16"
        )
        settings = {**DOORS[door], **SETTINGS, "accumulation": row.accumulation}
        if door != "kfac":
            # See `DOORS` for eps.  Sharded matrices send sketches, whatever would be smaller.
            settings.update(eps=1e-2, encoding="sketch")
        self.base: torch.optim.Optimizer
        self.door: Preconditioner | LowRankSOAP
        if door == "kfac":
            self.base = torch.optim.SGD(self.net.parameters(), lr=0.02)
            config = KfacConfig(damping=0.1, **settings)
            self.door = Preconditioner(self.net, config, "inline", grad_scaler=self.scaler)
        else:
            self.base = self.door = LowRankSOAP(
                self.net, lr=0.01, workers="inline", grad_scaler=self.scaler, **settings
            )

    def step(self, number: int) -> float:
        rows = ROWS // self.ranks
        x, y = (t[self.rank * rows :][:rows] for t in make_batch(number % BATCHES))
        self.base.zero_grad()
        total = 0.0
        parts = list(
            zip(x.chunk(self.row.accumulation), y.chunk(self.row.accumulation), strict=True)
        )
        for part, (inputs, targets) in enumerate(parts, 1):
            with self._synchronised(part == len(parts)):
                loss = self._loss(inputs, targets) / len(parts)
                self.scaler.scale(loss).backward()
            total += loss.item()
        if isinstance(self.door, Preconditioner):
            self.scaler.unscale_(self.base)
            self.door.step()
        self.scaler.step(self.base)
        self.scaler.update()
        return total

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        dtype = DTYPES[self.row.precision]
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            out = self.net(inputs)
        return F.mse_loss(out.float(), targets)

    def _synchronised(self, last: bool) -> Any:
        if self.row.wrapper == "ddp":
            return nullcontext() if last else self.net.no_sync()
        self.net.set_requires_gradient_sync(last)
        return nullcontext()

    def params(self) -> list[Tensor]:
        """The whole parameters; a collective where they are sharded."""
        return [
            (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
            for p in self.net.parameters()
        ]


def loop_row(save: Any, door: str, row: list[Any]) -> dict[str, Any]:
    """Train in one way."""
    loop = Loop(door, Row(*row))
    with loop.door:
        losses = [loop.step(number) for number in range(STEPS)]
        params = loop.params()
    save(params)
    return {
        "first": sum(losses[:BATCHES]),
        "last": sum(losses[-BATCHES:]),
        "finite": all(p.isfinite().all() for p in params)
        and torch.tensor(losses).isfinite().all().item(),
        "checksum": checksum(params),
        "log": [list(record) for record in loop.door.install_log],
        "nonfinite": loop.door.metrics()["statistics_nonfinite"],
    }


def overflowed_step(save: Any, door: str, wrapper: str) -> dict[str, Any]:
    """One rank's loss overflows at some steps; twice, to be compared with the steps left out."""
    found: dict[str, Any] = {}
    for overflowing in (True, False):
        loop = Loop(door, Row(wrapper, "fp16", 1, False))
        with loop.door:
            for number in range(STEPS // 2):
                bad = number in (2, 7)
                if bad and not overflowing:
                    if isinstance(loop.door, Preconditioner):
                        loop.base.zero_grad()
                        loop.door.step()
                    continue
                loop.step(number) if not bad else _overflow(loop, number)
            params = loop.params()
        found["with" if overflowing else "without"] = checksum(params)
        found["counted" if overflowing else "none"] = loop.door.metrics()["statistics_nonfinite"]
    return found


def _overflow(loop: Loop, number: int) -> None:
    """The last layer of rank 1 alone has an output gradient that is not finite."""
    layer = bare_model(loop.net).layers[-1]
    factor = torch.inf if loop.rank == 1 else 1.0

    def spoil(module: nn.Module, args: Any, out: Tensor) -> None:
        out.register_hook(lambda grad: grad * factor)

    handle = layer.register_forward_hook(spoil)
    loop.step(number)
    handle.remove()


def empty_batches(save: Any, door: str) -> dict[str, Any]:
    """Rank 1 has no samples in every third step and a few in every other one."""
    loop = Loop(door, Row("ddp", "fp32", 1, False))
    share = ROWS // loop.ranks
    losses = []
    with loop.door:
        for number in range(STEPS):
            x, y = (t[loop.rank * share :][:share] for t in make_batch(number % BATCHES))
            if loop.rank == 1:
                count = (0, 3, share)[number % 3]
                x, y = x[:count], y[:count]
            loop.base.zero_grad()
            # Divided by the same number on all ranks, as loops with such batches do.
            loss = F.mse_loss(loop.net(x), y, reduction="sum") / (share * y.shape[1])
            loss.backward()
            loop.door.step()
            if loop.base is not loop.door:
                loop.base.step()
            losses.append(loss.item())
        params = loop.params()
    return {
        "first": sum(losses[: 3 * BATCHES]),
        "last": sum(losses[-3 * BATCHES :]),
        "finite": all(p.isfinite().all().item() for p in params),
        "checksum": checksum(params),
        "version": loop.door.metrics()["version"],
    }
