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
from dataclasses import dataclass

import torch

from distcurv.config import ServiceConfig
from distcurv.errors import StateError
from distcurv.train.backlog import Backlog, Span
from distcurv.train.conversation import JobInfo
from distcurv.train.courier import Courier, Outgoing
from distcurv.train.depot import Depot
from distcurv.train.table import BlockTable, longest_processing_time, refresh_cost
from distcurv.wire.link import Link

log = logging.getLogger("distcurv.train")

MESSAGE_BYTES = 256 << 20  # a window that is larger travels in several messages


@dataclass(frozen=True)
class OwnerLinks:
    """How an owner reaches its services.

    ``inline`` connects to the in-process service, ``remotes`` are (endpoint, connect) pairs,
    ``close`` ends whatever was started for them in this process."""

    inline: Callable[[], Link]
    remotes: tuple[tuple[str, Callable[[], Link]], ...]
    close: Callable[[], None]


@dataclass
class Lane:
    """A worker and its blocks.  ``active`` is the courier that was used last."""

    blocks: list[int]
    remote: Courier | None
    active: Courier | None = None
    early: bool = False
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
        self._pid = os.getpid()
        self.blocks = table.owned_by(rank)
        self.backlog = Backlog(table, self.blocks, depot)

        def courier(
            blocks: list[int], connect: Callable[[], Link], route: str, name: str
        ) -> Courier:
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

        self._new_inline = lambda: courier(
            self.blocks, links.inline, "inline", "in-process service"
        )
        self.inline = self._new_inline()
        self._inline_started = False
        self._retired: list[Courier] = []
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

    # -- statistics -----------------------------------------------------------------------

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
                continue
            blocks = [b for b in lane.blocks if only is None or b in only]
            for span, group in self.backlog.sendable(blocks).items():
                for part in self._messages(group):
                    self._send(courier, span, part)
        self.backlog.compact()

    def _messages(self, blocks: list[int]) -> list[list[int]]:
        """The blocks in order, cut where a message would pass `MESSAGE_BYTES`."""
        messages: list[list[int]] = [[]]
        held = 0
        for block in blocks:
            nbytes = 4 * self._table.statistic_layouts[block].size
            if messages[-1] and held + nbytes > MESSAGE_BYTES:
                messages.append([])
                held = 0
            messages[-1].append(block)
            held += nbytes
        return messages

    def _send(self, courier: Courier, span: Span, blocks: list[int]) -> None:
        basis, payload = self.backlog.first(blocks)
        ready = None
        if payload.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        out = Outgoing(span, blocks, basis, payload, ready)
        while not courier.offer(out):
            if self._config.install_delay is None or courier is self.inline:
                return
            self._wait(lambda: courier.up, lambda: f"worker {courier.name} to answer again")
        self.backlog.sent(blocks)

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
            self._wait(
                lambda: remote.up, lambda: f"worker {remote.name} to answer ({remote.last_error})"
            )
            chosen = remote
        elif lane.remote.up and step >= lane.avoid_until:
            chosen = lane.remote
        else:
            self._warn_unreachable(lane)
            chosen = self._inline() if self._fallback else None
        if chosen is not None and (chosen is not lane.active or (lane.early and not early)):
            # Also at the end of the early phase where the route stays in process: a service that
            # is seeded then starts from the same published numbers wherever it runs.
            if lane.active is not None:
                lane.active.withdraw(lane.blocks, f"route switched to {chosen.name}")
            lane.active = chosen
            if self._inline_started and all(lane.active is not self.inline for lane in self.lanes):
                self._retire_inline()
        lane.early = early
        return chosen

    def _retire_inline(self) -> None:
        """End the in-process service's session: it holds factors and bases of all blocks, which
        workers hold from here on.  Where it is needed again it is seeded like any worker."""
        self.inline.stop()
        self._retired.append(self.inline)
        self.inline = self._new_inline()
        self._inline_started = False

    def _inline(self) -> Courier:
        if not self._inline_started:
            self._inline_started = True
            self.inline.start()
        if not self.inline.up:
            self._wait(
                lambda: self.inline.up,
                lambda: f"the in-process service to start ({self.inline.last_error})",
            )
        return self.inline

    def _warn_unreachable(self, lane: Lane) -> None:
        if self._warned or lane.remote is None or lane.remote.up:
            return
        self._warned = True
        text = (
            f"no curvature worker reachable at {lane.remote.name} "
            f"({lane.remote.last_error or 'not connected yet'}): training goes on, "
            + ("refreshing in process" if self._fallback else "with what is installed")
        )
        log.warning(text)
        self._emit("warning", text=text)

    # -- waiting and ending ---------------------------------------------------------------

    def settle(self, through: int | None = None) -> None:
        """Wait until nothing based on step ``through`` or earlier is in flight.

        Only for the modes that may wait.  Raises `StateError` after ``wait_timeout``."""

        def ready() -> bool:
            flights = [self._depot.in_flight(block) for block in self.blocks]
            return not any(
                f is not None and (through is None or f.through <= through) for f in flights
            )

        self._wait(ready, lambda: "a refresh to finish")

    def _wait(self, ready: Callable[[], bool], what: Callable[[], str]) -> None:
        if not self._depot.wait(ready, self._config.wait_timeout):
            raise StateError(
                f"waited {self._config.wait_timeout:g} s for {what()}: look at the worker, or use "
                "install_delay=None, in which step() never waits for a worker"
            )

    def reseed(self) -> None:
        """Forget what every service knows (after load_state_dict): all is seeded anew."""
        self.backlog.discard(self.blocks, "state_dict loaded")
        for courier in [self.inline] + [lane.remote for lane in self.lanes if lane.remote]:
            courier.withdraw(self.blocks, "state_dict loaded")
        for lane in self.lanes:
            lane.active = None
            lane.avoid_until = -1

    def close(self, timeout: float) -> None:
        """Say goodbye and end the threads; what waits is counted as dropped."""
        if os.getpid() != self._pid:
            return  # a forked child: the threads, the links and the workers are its parent's
        couriers = [lane.remote for lane in self.lanes if lane.remote is not None]
        couriers += [*self._retired, self.inline] if self._inline_started else self._retired
        for courier in couriers:
            courier.stop()
        for courier in couriers:
            if not courier.join(timeout):
                log.warning("the link to %s hangs; its thread is left behind", courier.name)
                # Its thread will not count what it held; a late answer is then refused.
                courier.withdraw(self.blocks, "the link hangs")
        self.backlog.discard(self.blocks, "closed")
        self._links.close()
