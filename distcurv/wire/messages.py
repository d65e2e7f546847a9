"""The closed set of messages between an owner and a worker, as a table of fields.

Nothing but these kinds exists on a link.  A message is a frozen dataclass; the table says for
each field what the codec must check before a value is believed.  There is no I/O here.

Conventions: ``blocks`` are indices into the session's block table (the list in `Hello`);
lists that stand beside ``blocks`` have the same length; ``payload`` is one flat float32 tensor,
the concatenation of the blocks' layouts in the order of ``blocks``.  What the blocks' table has
travel as float16 is left out there and is in ``narrow``, in the same order: one flat float16
tensor, empty where there is nothing of the sort.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

PROTOCOL = 3
NOTHING = torch.empty(0, dtype=torch.float16)


@dataclass(frozen=True)
class Hello:
    """Owner to worker, first message of a session: who asks, and about which blocks."""

    protocol: int
    job: bytes  # 16 random bytes, the same for all ranks of a job
    session: bytes  # 16 random bytes, new for every connection
    generation: int  # grows when a job restarts; a worker drops older ones
    owner: int  # the training rank that speaks
    table_hash: bytes  # 32 bytes, hash of the block table of the whole job
    blocks: list[dict[str, object]]  # BlockSpec.to_fields() of this session's blocks


@dataclass(frozen=True)
class Welcome:
    """Worker to owner: the session is open."""

    session: bytes
    pid: int
    device: str


@dataclass(frozen=True)
class Seed:
    """Owner to worker: full states to start from.  Several versions of one block may follow
    each other, oldest first, so that statistics against an older basis can still be folded."""

    session: bytes
    blocks: list[int]
    versions: list[int]
    based_on: list[int]  # the training step that each version is based on; -1 for none
    payload: Tensor  # published layouts, all of them float32: a state is exact


@dataclass(frozen=True)
class Statistics:
    """Owner to worker: reduced statistics, each against one basis version of its block."""

    session: bytes
    seq: int  # grows by one per message of a session
    since: int  # first training step that contributed
    through: int  # last training step that contributed; becomes based_on_step
    blocks: list[int]
    basis: list[int]  # version of the basis that each block's sketch was taken against
    payload: Tensor  # statistic layouts
    narrow: Tensor = NOTHING


@dataclass(frozen=True)
class Ack:
    """Either way.  Worker: statistic ``seq`` of these blocks is folded (``what`` =
    ``statistics``, ``numbers`` = its seq).  Owner: these versions arrived (``published``)."""

    session: bytes
    what: str
    blocks: list[int]
    numbers: list[int]


@dataclass(frozen=True)
class Published:
    """Worker to owner: new versions.  Resent until acknowledged; the latest wins."""

    session: bytes
    blocks: list[int]
    versions: list[int]
    based_on: list[int]
    seqs: list[int]  # the Statistics.seq that each version folded last
    uncaptured: list[float]  # largest over the sides, 1 - sum(lambda)/trace
    innovation: list[float]  # largest over the sides; -1 where there was nothing to compare
    seconds: float  # compute time of this refresh, for all its blocks together
    payload: Tensor  # published layouts
    narrow: Tensor = NOTHING


@dataclass(frozen=True)
class Heartbeat:
    """Either way, about once a second: alive.  A worker adds how busy it is."""

    session: bytes
    busy: float  # share of the time since the last heartbeat that was spent computing, 0..1
    queued: int  # statistics waiting to be folded


@dataclass(frozen=True)
class Goodbye:
    """Either way: the session ends on purpose."""

    session: bytes
    reason: str


@dataclass(frozen=True)
class Error:
    """Either way: something of the peer's was refused.  ``code`` is a short stable word."""

    session: bytes  # empty when the bytes could not be attributed to a session
    code: str
    text: str
    blocks: list[int] = field(default_factory=list)  # blocks whose statistic was refused
    seq: int = -1


Message = Hello | Welcome | Seed | Statistics | Ack | Published | Heartbeat | Goodbye | Error

EMPTY = torch.empty(0)
