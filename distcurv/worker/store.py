"""What a worker keeps for the blocks of one session; no I/O, no clock, no arithmetic.

Per block: its state, the versions that statistics may still be taken against, a bounded queue of
statistics and the newest version that its owner has not acknowledged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from distcurv.curvature.kinds import KINDS
from distcurv.curvature.narrow import Sent
from distcurv.curvature.spec import BlockSpec, Layout, Tensors
from distcurv.worker.jobs import Folded, Item
from distcurv.worker.schedule import Waiting
from distcurv.worker.settings import WorkerSettings

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Queued:
    """A statistic that waits, with the basis it needs: so bases can be pruned on arrival."""

    seq: int
    through: int
    arrived: float
    statistic: Tensor  # flat, statistic layout
    basis: Tensor  # flat, published layout


@dataclass
class Release:
    """A version that goes to the owner until it is acknowledged."""

    version: int
    based_on: int
    seq: int
    sent: Sent  # flat, published layout
    uncaptured: float
    innovation: float
    seconds: float  # this block's share of the compute time
    sent_at: float


@dataclass
class Block:
    """One block of a session.  ``newest`` is -1 until the first seed."""

    spec: BlockSpec
    statistic_layout: Layout
    published_layout: Layout
    shape_key: tuple[object, ...]
    newest: int = -1
    bases: dict[int, Tensor] = field(default_factory=dict)  # flat, ascending versions
    state: Tensors | None = None
    queue: deque[Queued] = field(default_factory=deque)
    computing: Queued | None = None
    innovation: float = -1.0
    failures: int = 0


class BlockStore:
    """The blocks of one session, in the order of its table."""

    def __init__(self, specs: Sequence[BlockSpec], settings: WorkerSettings) -> None:
        self.settings = settings
        self.blocks: list[Block] = []
        for spec in specs:
            kind = KINDS[spec.kind]
            self.blocks.append(
                Block(
                    spec=spec,
                    statistic_layout=kind.statistic_layout(spec),
                    published_layout=kind.published_layout(spec),
                    shape_key=spec.shape_key(),
                )
            )
        self.unacknowledged: dict[int, Release] = {}
        self._with_queue: dict[int, None] = {}  # an ordered set of blocks

    def names(self, blocks: Sequence[int]) -> list[str]:
        """The blocks' names, for events and logs."""
        return [self.blocks[block].spec.name for block in blocks]

    def unfolded(self) -> int:
        """Statistics received and not yet folded, those being computed included."""
        waiting = sum(len(self.blocks[block].queue) for block in self._with_queue)
        return waiting + sum(map(self.computing, range(len(self.blocks))))

    def seed(self, block: int, versions: Mapping[int, Tensor]) -> None:
        """Start a block anew from these versions (flat, ascending); the last is the newest.

        Whatever was known of the block is forgotten, statistics that wait or are being folded
        included: the owner has given them up and counted them, else it would not seed again.
        The tensors are copied, because the payload they lie in is larger."""
        entry = self.blocks[block]
        entry.bases = {version: published.clone() for version, published in versions.items()}
        entry.newest = max(versions)
        entry.state = None
        entry.innovation = -1.0
        entry.queue.clear()
        entry.computing = None
        self._with_queue.pop(block, None)
        self.unacknowledged.pop(block, None)

    def computing(self, block: int) -> bool:
        """Whether a statistic of this block is being folded (no: it was seeded meanwhile)."""
        return self.blocks[block].computing is not None

    def refusal(self, block: int, basis: int) -> str | None:
        """The error code for a statistic that cannot be taken, or None."""
        entry = self.blocks[block]
        if basis not in entry.bases:
            return "unknown_basis"
        if len(entry.queue) >= self.settings.max_queued:
            return "overrun"
        return None

    def enqueue(
        self, block: int, basis: int, seq: int, through: int, now: float, statistic: Tensor
    ) -> None:
        """Queue a statistic that `refusal` let through, and drop the bases before its own.

        ``statistic`` (flat) is copied: a view would keep the whole message alive."""
        entry = self.blocks[block]
        entry.queue.append(Queued(seq, through, now, statistic.clone(), entry.bases[basis]))
        self._with_queue[block] = None
        for version in [held for held in entry.bases if held < basis]:
            del entry.bases[version]

    def waiting(self, session: int) -> Iterator[Waiting]:
        """The head of each queue whose block is free to be refreshed."""
        for block in self._with_queue:
            entry = self.blocks[block]
            if entry.computing is None:
                head = entry.queue[0]
                yield Waiting(
                    session=session,
                    block=block,
                    seq=head.seq,
                    shape_key=entry.shape_key,
                    arrived=head.arrived,
                    nbytes=entry.published_layout.size * FLOAT_BYTES,
                    innovation=entry.innovation,
                )

    def take(self, block: int) -> Item:
        """Move the head of a block's queue into computation."""
        entry = self.blocks[block]
        entry.computing = entry.queue.popleft()
        if not entry.queue:
            del self._with_queue[block]
        return Item(
            block=block,
            name=entry.spec.name,
            state=entry.state,
            newest=entry.bases[entry.newest],
            basis=entry.computing.basis,
            statistic=entry.computing.statistic,
        )

    def fold(self, block: int, result: Folded, seconds: float, now: float) -> Release:
        """Take a result in: one statistic yields one version, the newest plus one."""
        entry = self.blocks[block]
        done = entry.computing
        if done is None:
            raise AssertionError(f"block {entry.spec.name} has a result but was not computing")
        entry.computing = None
        entry.newest += 1
        entry.state = result.state
        entry.innovation = result.innovation
        self._keep_basis(entry, entry.newest, result.published)
        release = Release(
            version=entry.newest,
            based_on=done.through,
            seq=done.seq,
            sent=result.sent,
            uncaptured=result.uncaptured,
            innovation=result.innovation,
            seconds=seconds,
            sent_at=now,
        )
        self.unacknowledged[block] = release
        return release

    def fail(self, block: int) -> None:
        """The statistic under computation could not be folded: the previous version stands."""
        entry = self.blocks[block]
        entry.computing = None
        entry.failures += 1

    def acknowledge(self, block: int, version: int) -> None:
        """The owner has ``version``: stop resending it and anything before it."""
        release = self.unacknowledged.get(block)
        if release is not None and version >= release.version:
            del self.unacknowledged[block]

    def overdue(self, now: float) -> list[tuple[int, Release]]:
        """What was sent a heartbeat ago or earlier and is not acknowledged; marks it as sent."""
        late = [
            (block, release)
            for block, release in self.unacknowledged.items()
            if now - release.sent_at >= self.settings.heartbeat
        ]
        for _, release in late:
            release.sent_at = now
        return late

    def _keep_basis(self, entry: Block, version: int, published: Tensor) -> None:
        entry.bases[version] = published
        if len(entry.bases) > self.settings.max_bases:
            # The oldest is in use and the newest will be; the one after the oldest was
            # superseded longest ago, so it is the least likely to be asked for.
            del entry.bases[sorted(entry.bases)[1]]
