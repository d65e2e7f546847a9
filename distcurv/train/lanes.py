"""The owner's lanes: which courier serves which blocks, and what waits to be sent.

A lane is a worker with the blocks that this owner has given it.  Statistics go to it one at a
time per block; while one is in flight, later windows add up.  In the early phase, and where the
configuration says so, the in-process service takes a lane over: the route is switched by giving
up what the other one still has in flight and seeding the new one from the newest state.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distcurv.config import ServiceConfig
from distcurv.errors import StateError
from distcurv.train.conversation import JobInfo
from distcurv.train.courier import Courier, Outgoing
from distcurv.train.depot import Depot
from distcurv.train.table import BlockTable, longest_processing_time, refresh_cost
from distcurv.wire.link import Link

log = logging.getLogger("distcurv.train")

_MAX_BASES = 2  # pending statistics per block: one per basis, two bases


@dataclass(frozen=True)
class OwnerLinks:
    """How an owner reaches its services.

    ``inline`` connects to the in-process service, ``remotes`` are (endpoint, connect) pairs,
    ``close`` ends whatever was started for them in this process."""

    inline: Callable[[], Link]
    remotes: tuple[tuple[str, Callable[[], Link]], ...]
    close: Callable[[], None]


@dataclass
class Pending:
    """A block's statistics against one basis that wait to be sent."""

    basis: int
    since: int
    through: int
    captures: int
    flat: Tensor = field(repr=False)


@dataclass
class Lane:
    """A worker and its blocks.  ``active`` is the courier that was used last."""

    blocks: list[int]
    remote: Courier | None
    active: Courier | None = None
    avoid_until: int = -1


class Lanes:
    """All lanes of one owner; used by the training thread only.

    Args:
        inline_fallback: refresh in process while a lane's worker is out of reach or too stale.
    """

    def __init__(
        self,
        table: BlockTable,
        rank: int,
        links: OwnerLinks,
        depot: Depot,
        config: ServiceConfig,
        job: bytes,
        generation: int,
        emit: Callable[..., None],
        inline_fallback: bool,
    ) -> None:
        self._table = table
        self._config = config
        self._depot = depot
        self._emit = emit
        self._fallback = inline_fallback
        self._links = links
        self._warned = False
        self.blocks = table.owned_by(rank)
        self._pending: dict[int, list[Pending]] = {block: [] for block in self.blocks}

        def courier(blocks: list[int], connect: Callable[[], Link], route: str, name: str) -> Courier:
            info = JobInfo(
                # The in-process service serves this owner alone: its job is its own.
                job=job if route == "worker" else os.urandom(16),
                generation=generation,
                owner=rank,
                table=table,
                blocks=tuple(blocks),
                heartbeat=config.heartbeat,
                link_timeout=config.link_timeout if route == "worker" else config.wait_timeout,
                emit=emit,
            )
            return Courier(connect, info, depot, route, emit, name)

        self.inline = courier(self.blocks, links.inline, "inline", "in-process service")
        self._inline_started = False
        costs = [refresh_cost(table.specs[b]) for b in self.blocks]
        bins = longest_processing_time(costs, max(1, len(links.remotes)))
        self.lanes: list[Lane] = []
        for i in range(max(1, len(links.remotes))):
            mine = [b for b, chosen in zip(self.blocks, bins, strict=True) if chosen == i]
            if not mine:
                continue
            remote = None
            if links.remotes:
                endpoint, connect = links.remotes[i]
                remote = courier(mine, connect, "worker", endpoint)
                remote.start()
            self.lanes.append(Lane(mine, remote))

    @property
    def has_workers(self) -> bool:
        """Whether any lane has a worker process."""
        return any(lane.remote is not None for lane in self.lanes)

    def pending_steps(self) -> int:
        """(block, statistic step) that wait to be sent."""
        return sum(p.captures for queue in self._pending.values() for p in queue)

    def oldest_basis(self, block: int, current: int) -> int:
        """The oldest basis version against which a statistic of this block may still be sent."""
        return min([current] + [p.basis for p in self._pending[block]])

    # -- statistics -----------------------------------------------------------------------

    def add(
        self, since: int, through: int, captures: int, bucket: Tensor, basis: list[int]
    ) -> None:
        """Add a closed and reduced window.

        Args:
            bucket: the owner's bucket, statistic layouts of its blocks in table order.
            basis: version by block of the basis that the window was taken against.
        """
        sizes = [self._table.statistic_layouts[b].size for b in self.blocks]
        self._depot.count(observed=captures * len(self.blocks))
        if captures == 0:
            return
        for block, flat in zip(self.blocks, bucket.split(sizes), strict=True):
            queue = self._pending[block]
            if queue and queue[-1].basis == basis[block]:
                queue[-1].flat.add_(flat)
                queue[-1].through = through
                queue[-1].captures += captures
                continue
            queue.append(Pending(basis[block], since, through, captures, flat))
            if len(queue) > _MAX_BASES:
                old = queue.pop(0)
                self._depot.drop([block], old.captures, "statistics against an old basis")

    def discard(self, block: int, reason: str) -> None:
        """Drop everything that waits for a block."""
        for pending in self._pending[block]:
            self._depot.drop([block], pending.captures, reason)
        self._pending[block] = []

    def post(self, step: int, *, early: bool, stale: bool, only: set[int] | None = None) -> None:
        """Hand over what may be sent.

        Args:
            step: current training step.
            early: use the in-process service.
            stale: staleness has passed its bound in some block of this owner.
            only: restrict to these blocks (replay).
        """
        for lane in self.lanes:
            courier = self._choose(lane, step, early=early, stale=stale)
            if courier is None:
                self._warn_unreachable(lane)
                continue
            groups: dict[tuple[int, int, int], list[int]] = {}
            for block in lane.blocks:
                queue = self._pending[block]
                if not queue or self._depot.in_flight(block) is not None:
                    continue
                if only is not None and block not in only:
                    continue
                key = (queue[0].since, queue[0].through, queue[0].captures)
                groups.setdefault(key, []).append(block)
            for key, blocks in groups.items():
                self._send(courier, key, blocks)

    def _send(self, courier: Courier, key: tuple[int, int, int], blocks: list[int]) -> None:
        first = [self._pending[block][0] for block in blocks]
        payload = torch.cat([pending.flat for pending in first])
        ready = None
        if payload.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        out = Outgoing(*key, blocks, [pending.basis for pending in first], payload, ready)
        if courier.offer(out):
            for block in blocks:
                self._pending[block].pop(0)
        # What stays must not keep the whole bucket alive.
        for queue in self._pending.values():
            for pending in queue:
                if pending.flat.untyped_storage().nbytes() > 4 * pending.flat.numel():
                    pending.flat = pending.flat.clone()

    # -- routes ---------------------------------------------------------------------------

    def _choose(self, lane: Lane, step: int, *, early: bool, stale: bool) -> Courier | None:
        if stale and self._fallback and lane.remote is not None and lane.active is lane.remote:
            lane.avoid_until = step + self._config.resolved_max_staleness
        deterministic = self._config.install_delay is not None
        chosen: Courier | None
        if early or lane.remote is None:
            chosen = self._inline()
        elif deterministic:
            remote = lane.remote
            self._wait(lambda: remote.up, f"worker {remote.name} to answer ({remote.last_error})")
            chosen = remote
        elif lane.remote.up and step >= lane.avoid_until:
            chosen = lane.remote
        else:
            chosen = self._inline() if self._fallback else None
        if chosen is not None and chosen is not lane.active:
            if lane.active is not None:
                lane.active.withdraw(lane.blocks, f"route switched to {chosen.name}")
            lane.active = chosen
        return chosen

    def _inline(self) -> Courier:
        if not self._inline_started:
            self._inline_started = True
            self.inline.start()
        if not self.inline.up:
            self._wait(lambda: self.inline.up, "the in-process service to start")
        return self.inline

    def _warn_unreachable(self, lane: Lane) -> None:
        if self._warned or lane.remote is None:
            return
        self._warned = True
        text = (
            f"no curvature worker reachable at {lane.remote.name} "
            f"({lane.remote.last_error or 'not connected yet'}): training goes on with what is "
            "installed; statistics add up meanwhile"
        )
        log.warning(text)
        self._emit("warning", text=text)

    def warn_fallback(self) -> str | None:
        """Name of a worker that the in-process service stands in for, if any."""
        for lane in self.lanes:
            if lane.remote is not None and lane.active is self.inline:
                return lane.remote.name
        return None

    # -- waiting and ending ---------------------------------------------------------------

    def settle(self, through: int | None = None) -> None:
        """Wait until nothing based on step ``through`` or earlier is in flight.

        Only for the modes that may wait.  Raises `StateError` after ``wait_timeout``."""

        def ready() -> bool:
            flights = [self._depot.in_flight(block) for block in self.blocks]
            return not any(
                f is not None and (through is None or f.through <= through) for f in flights
            )

        self._wait(ready, "a refresh to finish")

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        if not self._depot.wait(ready, self._config.wait_timeout):
            raise StateError(
                f"waited {self._config.wait_timeout:g} s for {what}: look at the worker, or use "
                "install_delay=None, in which step() never waits for a worker"
            )

    def reseed(self) -> None:
        """Forget what every service knows (after load_state_dict): all is seeded anew."""
        for block in self.blocks:
            self.discard(block, "state_dict loaded")
        for courier in [self.inline] + [lane.remote for lane in self.lanes if lane.remote]:
            courier.withdraw(self.blocks, "state_dict loaded")
        for lane in self.lanes:
            lane.active = None
            lane.avoid_until = -1

    def close(self, timeout: float) -> None:
        """Say goodbye and end the threads; what waits is counted as dropped."""
        couriers = [lane.remote for lane in self.lanes if lane.remote is not None]
        couriers += [self.inline] if self._inline_started else []
        for courier in couriers:
            courier.stop()
        for courier in couriers:
            if not courier.join(timeout):
                log.warning("the link to %s hangs; its thread is left behind", courier.name)
        for block in self.blocks:
            self.discard(block, "closed")
        self._links.close()
