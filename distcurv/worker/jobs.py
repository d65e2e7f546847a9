"""What passes between the service and the compute thread: plain data, no behaviour.

Letters: B blocks of one shape refreshed in one call; flat tensors are 1-D float32 on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distcurv.curvature.narrow import Sent
from distcurv.curvature.spec import BlockSpec, Tensors


@dataclass(frozen=True)
class Item:
    """One block of a job."""

    block: int  # index into the session's table
    name: str
    state: Tensors | None  # without batch dimension; None: to be made from ``newest``
    newest: Tensor  # flat, the newest version's published layout
    basis: Tensor  # flat, published layout of the version that the statistic was taken against
    statistic: Tensor  # flat, statistic layout


@dataclass(frozen=True)
class Job:
    """One refresh call.  ``ticket`` is unique in a service; ``spec`` is any of the blocks'."""

    ticket: int
    seq: int
    spec: BlockSpec
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Folded:
    """A refresh that worked.

    ``state`` is without batch dimension; ``sent`` is the version as it travels, and ``published``
    as its owner has it then: the same tensor as ``sent.payload`` where nothing is narrow."""

    state: Tensors
    sent: Sent
    published: Tensor
    uncaptured: float
    innovation: float


@dataclass(frozen=True)
class Failed:
    """A refresh that did not work, and why; the block's previous version stands."""

    text: str


@dataclass(frozen=True)
class Outcome:
    """Results in the order of the job's items; ``t0``, ``t1`` are monotonic nanoseconds."""

    results: tuple[Folded | Failed, ...]
    t0: int
    t1: int
