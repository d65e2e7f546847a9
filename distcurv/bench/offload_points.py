"""The points of `bench offload`: sizes of a model, and what measuring one would take.

What would not fit into the memory or the time that the user gives is left out before it is begun,
with its reason, so that a large grid may be asked for on a small machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch

from distcurv.bench.clock import now
from distcurv.config import KfacConfig
from distcurv.curvature.spec import BlockSpec, SideSpec
from distcurv.curvature.statistics import resolve_encoding
from distcurv.train.placement import Load, exchanged_bytes, inline_seconds
from distcurv.worker.settings import WorkerSettings
from distcurv.worker.table import claimed_bytes

KINDS = ("lowrank", "dense")
SOLO_ARMS = ("none", "worker", "inline")  # one rank
PAIR_ARMS = ("none", "sharded")  # two ranks
FEWEST = 3  # repetitions; fewer have no spread to speak of


@dataclass(frozen=True)
class Point:
    """A chain of ``blocks`` linear layers of ``width`` × ``width``.

    ``rank`` is 0 for dense kinds, which have none; ``rows`` is the batch, ``interval`` T."""

    kind: str
    blocks: int
    width: int
    rank: int
    rows: int
    interval: int

    def __str__(self) -> str:
        rank = f", r = {self.rank}" if self.rank else ""
        return f"{self.kind}, {self.blocks} x {self.width}{rank}"

    def fields(self) -> dict[str, str | int]:
        """For a message or a record."""
        return asdict(self)

    @property
    def warm_up_steps(self) -> int:
        """Past the first version that came through the exchange, and just before a post."""
        return 2 * self.interval + 3

    @property
    def turn_steps(self) -> int:
        """One window: it begins with a post and ends with the install of what came of that."""
        return self.interval

    def config(self, *, refreshing: bool = True) -> KfacConfig:
        """The settings of an arm; one that does not refresh keeps the version of its first step."""
        interval = self.interval if refreshing else 10**6
        return KfacConfig(
            kind=self.kind,
            rank=max(1, self.rank),
            preconditioner_upd_interval=interval,
            curvature_upd_interval=2,
            early_steps=1,  # all arms apply something from their first step on
            early_interval=interval,
            damping=1e-2,
            damping_form="relative",
            graft=True,  # the update keeps the gradient's size, whatever the factors
            link_timeout=120.0,
            wait_timeout=600.0,
        )

    def specs(self) -> tuple[BlockSpec, ...]:
        """The blocks as `Preconditioner` makes them of this model and `config`."""
        config = self.config()
        if self.kind == "dense":
            sides = (SideSpec(self.width, self.width, "none", "dense"),) * 2
        else:
            rank = min(config.rank, self.width)
            sides = (
                SideSpec(
                    self.width,
                    rank,
                    config.tail_in,
                    resolve_encoding(self.width, rank, config.tail_in, config.encoding),
                ),
                SideSpec(
                    self.width,
                    rank,
                    config.tail_out,
                    resolve_encoding(self.width, rank, config.tail_out, config.encoding),
                ),
            )
        return tuple(
            BlockSpec(str(i), self.kind, sides, config.factor_decay, config.damping_at(0), True)
            for i in range(self.blocks)
        )

    def load(self, owners: int = 1) -> Load:
        """What the rule of ``workers="auto"`` is asked; blocks are dealt out in turn."""
        return Load(self.specs(), tuple(i % owners for i in range(self.blocks)), self.interval)


def grid(
    kinds: Sequence[str],
    blocks: Sequence[int],
    widths: Sequence[int],
    ranks: Sequence[int],
    rows: int,
    interval: int,
) -> list[Point]:
    """All combinations; a rank above the width, or of a dense kind, is no point of its own."""
    points = []
    for kind in kinds:
        for rank in ranks if kind != "dense" else (0,):
            points += [
                Point(kind, many, width, rank, rows, interval)
                for width, many in product(widths, blocks)
                if rank <= width
            ]
    return points


def needed_bytes(point: Point) -> int:
    """Memory of all processes at one point, about: models, versions, statistics, services."""
    specs = point.specs()
    weights = 4 * point.blocks * point.width**2
    arms = len(SOLO_ARMS) + 2 * len(PAIR_ARMS)
    held = sum(exchanged_bytes(spec) for spec in specs)
    applied = 2 * weights if point.kind == "dense" else 0  # inverses of both sides, unpacked
    # Each arm keeps weights, versions and windows; two steps at a time have gradients and more.
    return arms * (weights + 4 * held + applied) + 8 * weights + 4 * held


def refusal(point: Point) -> str | None:
    """Why no service would take these blocks; None when they would."""
    limit = WorkerSettings().max_memory
    needed = claimed_bytes(point.specs(), WorkerSettings())
    if needed <= limit:
        return None
    return f"a worker may need {needed / 2**30:.1f} GiB, its limit is {limit / 2**30:.0f}"


def needed_seconds(point: Point, repetitions: int, rate: float) -> float:
    """Time to measure a point, about.

    Args:
        repetitions: turns of every arm.
        rate: operations per second of this machine's matrix products (`matmul_rate`).
    """
    size = point.blocks * point.width**2
    apply = 4 * point.width if point.kind == "dense" else 8 * point.rank
    step = (6 * point.rows + apply) * size / rate + 4e-5 * point.blocks + 40 * size / 1e10
    steps = point.warm_up_steps + repetitions * point.turn_steps
    refreshes = 3 + repetitions
    once = inline_seconds(point.specs())
    arms = len(SOLO_ARMS) + len(PAIR_ARMS)
    return arms * steps * step + 2.5 * refreshes * once + 1.0


def plan_point(
    point: Point, *, repetitions: int, seconds: float, memory: float, rate: float
) -> tuple[int, str | None]:
    """Repetitions that fit into ``seconds`` and ``memory`` (bytes), and why it is left out if it
    is."""
    needed = needed_bytes(point)
    if needed > memory:
        return 0, f"memory: needs about {needed / 2**30:.1f} GiB of {memory / 2**30:.1f}"
    refused = refusal(point)
    if refused is not None:
        return 0, f"memory: {refused}"
    for count in range(repetitions, min(FEWEST, repetitions) - 1, -1):
        if needed_seconds(point, count, rate) <= seconds:
            return count, None
    least = needed_seconds(point, min(FEWEST, repetitions), rate)
    return 0, f"time: needs about {least:.0f} s of {seconds:g}"


def matmul_rate(device: str = "cpu", size: int = 512) -> float:
    """Operations per second of float32 matrix products on a device (the CPU: as many threads as
    torch has), the best of a few."""
    matrix = torch.randn(size, size, device=device)
    best = float("inf")
    for _ in range(6):
        start = now(device)
        torch.mm(matrix, matrix)
        best = min(best, now(device) - start)
    return 2 * size**3 / best


def available_bytes(device: str = "cpu") -> int:
    """Memory that is free for use, on the CPU as Linux says; 4 GiB where it does not."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 4 * 2**30
