"""Where ``workers="auto"`` lets refreshes happen: on a worker of this node, or in process.

A pure rule, so that all ranks decide alike from what they have gathered.  Refreshing in process
costs an owner's training the whole refresh, on the core that trains; a worker costs it the way of
statistics and preconditioners through a socket.  A worker pays where the difference is worth a
process, and where a core is free for it.

The costs are linear in what the block table says; `CALIBRATION` holds their constants, fitted by
``distcurv bench offload`` to its own measurements (docs/decisions/0007-when-offloading-pays.md).
They are of one CPU core; another machine scales both sides of the comparison more or less alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from distcurv.config import ServiceConfig
from distcurv.curvature.kinds import KINDS
from distcurv.curvature.spec import RANKLESS, BlockSpec
from distcurv.train.table import BlockTable

WORKER, INLINE = "worker", "inline"


class Rates(NamedTuple):
    """Seconds that a window costs its owner's step thread: per block, operation and byte."""

    block: float
    operation: float
    byte: float


@dataclass(frozen=True)
class Calibration:
    """What refreshes and messages cost the training process.

    Attributes:
        inline: rates of a refresh in process, by kind; a kind that is not in it counts as dense.
        worker: rates of a statistic sent and a version received over a socket, any kind.
        least_gain: a worker must be so many times cheaper; what the fits may err by.
        least_saving: and save so many seconds per training step, on average.  The default repays
            the four seconds that starting a worker takes within 10,000 steps.
    """

    inline: dict[str, Rates]
    worker: Rates
    least_gain: float
    least_saving: float


# `distcurv bench offload` prints the rates that fit its measurements and writes them to its JSON.
CALIBRATION = Calibration(
    inline={
        "lowrank": Rates(2.9e-3, 0.0, 1.8e-8),
        "dense": Rates(1.6e-3, 1.7e-11, 1.2e-8),
    },
    worker=Rates(1.2e-4, 0.0, 3.3e-9),
    least_gain=2.0,
    least_saving=4e-4,
)


@dataclass(frozen=True)
class Load:
    """What is to be refreshed.

    Attributes:
        specs: the blocks.
        owners: the rank that owns each block.
        interval: training steps between two refreshes of a block.
        accelerated: training runs on a CUDA device.
    """

    specs: tuple[BlockSpec, ...]
    owners: tuple[int, ...]
    interval: int
    accelerated: bool = False

    @classmethod
    def of(cls, table: BlockTable, config: ServiceConfig, device: torch.device) -> Load:
        """Of a job whose statistics and installed tensors live on ``device``."""
        interval = config.resolved_preconditioner_upd_interval
        return cls(table.specs, table.owners, interval, device.type == "cuda")


class Choice(NamedTuple):
    """Where refreshes happen (`WORKER` or `INLINE`) and why, in one line."""

    place: str
    reason: str


def refresh_operations(spec: BlockSpec) -> float:
    """Floating point operations of one refresh of a block, terms in d alone dropped.

    A sketched side takes 37 d r² + 180 r³ (thin QRs of d×r and d×2r, two small SVDs), a dense one
    2 d³ (Cholesky factor and inverse), one of kind shampoo as long as 12 d³ of those (measured at
    d = 128 to 768, one core: 5.3 to 6.4 times a dense one), a factor without a basis none."""
    with_basis = [side for side in spec.sides if side.encoding not in RANKLESS]
    if spec.kind == "lowrank":
        return sum(37.0 * s.dim * s.rank**2 + 180.0 * s.rank**3 for s in with_basis)
    each = 12.0 if spec.kind == "shampoo" else 2.0
    return sum(each * s.dim**3 * s.units for s in with_basis)


def exchanged_bytes(spec: BlockSpec) -> int:
    """Bytes of a block's statistic and of its preconditioner between owner and worker."""
    kind = KINDS[spec.kind]
    return kind.statistic_layout(spec).nbytes + kind.published_layout(spec).nbytes


def inline_seconds(specs: Sequence[BlockSpec], calibration: Calibration = CALIBRATION) -> float:
    """What one refresh of these blocks in process costs the training, in seconds."""
    total = 0.0
    for spec in specs:
        rates = calibration.inline.get(spec.kind, calibration.inline["dense"])
        total += rates.block + rates.operation * refresh_operations(spec)
        # What a refresh computes with is float32, however it travels.
        total += rates.byte * exchanged_bytes(replace(spec, wire_dtype="float32"))
    return total


def worker_seconds(specs: Sequence[BlockSpec], calibration: Calibration = CALIBRATION) -> float:
    """What it costs the training when a worker on another core makes it, in seconds."""
    rates = calibration.worker
    return sum(rates.block + rates.byte * exchanged_bytes(spec) for spec in specs)


def choose(
    load: Load, spare_cores: Sequence[int], calibration: Calibration = CALIBRATION
) -> Choice:
    """Where refreshes should happen.

    Args:
        load: the blocks and how often they are refreshed.
        spare_cores: by node, usable cores beyond one for each training rank.
        calibration: what things cost.

    With several owners the slowest counts: in data-parallel training all ranks wait for it.  On a
    CUDA device nothing was measured; there a worker is taken wherever a core is free, so that the
    device that trains refreshes nothing.
    """
    if not load.specs:
        return Choice(INLINE, "no block to refresh")
    if min(spare_cores) < 1:
        return Choice(INLINE, "no core is left for a worker beside the training ranks")
    if load.accelerated:
        return Choice(WORKER, "a core is free, and training keeps its device to itself")
    # One number decides alike for all ranks: that of the owner whose refreshes take longest.
    shares = [
        [spec for spec, o in zip(load.specs, load.owners, strict=True) if o == owner]
        for owner in sorted(set(load.owners))
    ]
    slowest = max(shares, key=lambda specs: inline_seconds(specs, calibration))
    inline, worker = inline_seconds(slowest, calibration), worker_seconds(slowest, calibration)
    about = (
        f"refreshing in process would take an owner about {1e3 * inline:.3g} ms every "
        f"{load.interval} steps, exchange with a worker {1e3 * worker:.3g} ms"
    )
    pays = (
        inline >= calibration.least_gain * worker
        and inline - worker >= calibration.least_saving * load.interval
    )
    return Choice(WORKER if pays else INLINE, about)
