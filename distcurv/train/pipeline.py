"""The pipeline: the training side of the service, shared by every preconditioner.

It owns the window of statistics, the installed versions and the collectives between them, and
turns the `Timetable`'s plan for a step into calls.  It knows nothing of what a preconditioner
does with what is installed: `step` returns the installs of the step and the caller acts.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distcurv.config import ServiceConfig
from distcurv.curvature.spec import BlockSpec
from distcurv.errors import MismatchError, StateError
from distcurv.train import fingerprint
from distcurv.train.accord import Accord
from distcurv.train.backlog import Span
from distcurv.train.depot import Depot, State
from distcurv.train.group import Prints, RankGroup
from distcurv.train.lanes import Lanes
from distcurv.train.log import InstallLog, Record, Replay
from distcurv.train.named_events import NamedEvents
from distcurv.train.placement import Load
from distcurv.train.provider import Workers, event_sink, job_identity, owner_links
from distcurv.train.staleness import StalenessWatch, staleness
from distcurv.train.switch import Install, Switch, first_installs
from distcurv.train.table import BlockTable
from distcurv.train.timetable import Action, Plan, Timetable
from distcurv.train.window import Closed, Window


@dataclass
class _Reducing:
    closed: Closed
    works: list[dist.Work]
    basis: list[int]
    early: bool


class Pipeline:
    """Statistics in, installs out.  Must be constructed, stepped and loaded on all ranks alike.

    Args:
        specs: the blocks, the same on all ranks.
        config: settings; the same on all ranks.
        device: where statistics and installed tensors live.
        replicated: statistics are made from gradients that are already equal on all ranks, so
            only the owner contributes and nothing is reduced.
        workers: ``0``/``"inline"``, ``"auto"``, or endpoints.
        inline_fallback: refresh in process while no worker is reachable.
        replay: install log of a run to follow exactly (waits where it must).
    """

    def __init__(
        self,
        specs: Sequence[BlockSpec],
        config: ServiceConfig,
        *,
        device: torch.device,
        replicated: bool,
        workers: Workers,
        inline_fallback: bool,
        replay: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.config = config
        self.group = RankGroup(device)
        self.table = BlockTable.make(specs, self.group.nodes(), config.max_owners)
        self.group.agree(
            "the block table",
            self.table.digest_number,
            "build the same model and the same config on every rank",
        )
        self.group.agree(
            "the configuration", fingerprint.of_text(config.description()), "use one on all ranks"
        )
        self.device = device
        names = [spec.name for spec in self.table.specs]
        self.emit = emit = NamedEvents(event_sink(self.group.rank), names)
        self._replay = Replay(replay, len(self.table)) if replay is not None else None
        self.step_count = self._begun = 0
        self.install_log = InstallLog()
        self.staleness_watch = StalenessWatch(config, emit)
        self.depot = Depot(emit)
        links = owner_links(workers, self.group, Load.of(self.table, config, device))
        inline = not links.remotes
        self.group.agree(
            "whether workers are used", int(inline), "give all ranks endpoints or none"
        )
        self.timetable = Timetable.from_config(config, inline=inline)
        self.installed = first_installs(self.table, config.seed, device)
        self._window_basis = list(self.installed)
        for block in self.table.owned_by(self.group.rank):
            self.depot.reset(block, [State(0, -1, -1, self.installed[block].flat.cpu())])
        owners = sorted(set(self.table.owners))
        mine = [self.group.rank] if replicated else owners
        self.window = Window(self.table, [o for o in mine if o in owners], device)
        self._reduces = not replicated
        self.lanes = Lanes(
            self.table,
            self.group.rank,
            links,
            self.depot,
            config,
            *job_identity(self.group),
            emit,
            inline_fallback,
        )
        self._reducing: _Reducing | None = None
        self._switch = Switch(self.group, self.table, self.depot)
        self._accord = Accord(self.group, self.table.digest_number)
        self._print = fingerprint.Fingerprint(config.check_replicas)
        self._closed = False
        self._finalizer = weakref.finalize(self, self.lanes.close, 2.0)

    # -- statistics -----------------------------------------------------------------------

    @property
    def capture_due(self) -> bool:
        """Whether statistics are taken at the coming `step`."""
        return self.timetable.capture_due(self.step_count)

    def basis(self, block: int) -> Install:
        """What the window's statistics of a block are taken against."""
        return self._window_basis[block]

    def add(self, block: int, statistic: Mapping[str, Tensor]) -> None:
        """Add (part of) a block's statistic to the window."""
        self.window.add(block, statistic)

    # -- the step -------------------------------------------------------------------------

    def step(self, grads: Sequence[Tensor], settings: Sequence[float] = ()) -> list[Install]:
        """One training step: run the timetable's plan and return what was installed.

        Args:
            grads: reduced gradients, equal on all ranks, of which a fingerprint is compared.
            settings: what holds at this step (damping, ...), compared at sync points.
        """
        if self._closed:
            raise StateError("Pipeline.step was called after close()")
        if not self._accord.settled():
            return []
        step = self._begun = self.step_count
        plan = self.timetable.plan(step)
        try:
            now = 0
            if plan.together or Action.POLL in plan.actions:
                due = self.timetable.cycles.at(step), self.window.captures, self.capture_due
                now = fingerprint.of_text(repr((*due, *settings)))
            if plan.together and not self._accord.meet(step, Prints(self._print.now(grads), now)):
                return []
            installs = self._run(step, plan, grads, now)
        except MismatchError as error:
            self._accord.part(error)
            return []
        self.staleness_watch.look(self.installed, step, self.timetable.staleness_bound(step))
        self.step_count = step + 1
        return installs

    def _run(self, step: int, plan: Plan, grads: Sequence[Tensor], settings: int) -> list[Install]:
        if self.capture_due:
            self.window.count_capture()
        installs: list[Install] = []
        for action in plan.actions:
            if action is Action.CLOSE:
                self._close_window(step, plan)
            elif action is Action.POST:
                self._post(step)
            elif action is Action.AWAIT:
                self.lanes.settle(plan.based_on)
            elif action is Action.POLL:
                self._begin_poll(step, plan, grads, settings)
            elif action is Action.ANNOUNCE:
                self._switch.announce(self.installed)
            else:
                installs = self._install(step)
        if Action.CLOSE in plan.actions:
            # What this step installed is the basis of the window that begins with the next.
            self._window_basis = list(self.installed)
        return installs

    def _close_window(self, step: int, plan: Plan) -> None:
        closed = self.window.close(step)
        works = self.group.begin_reduce(closed.buckets) if self._reduces else []
        basis = [install.version for install in self._window_basis]
        self._reducing = _Reducing(closed, works, basis, plan.early)

    def _post(self, step: int) -> None:
        if self._reducing is None:
            return
        reducing, self._reducing = self._reducing, None
        self.group.finish(reducing.works)
        if not self.lanes.blocks:
            return
        closed = reducing.closed
        self.depot.count(observed=closed.captures * len(self.lanes.blocks))
        span = Span(closed.since, closed.through, closed.captures)
        self.lanes.backlog.add(span, closed.buckets[self.group.rank], reducing.basis)
        if self._waits(reducing.early):
            self.lanes.settle()
        only = None
        if self._replay is not None:
            only, lost = self._replay.window(self.lanes.blocks, closed.through)
            self.lanes.backlog.discard(lost, "not in the log that is replayed")
        self.lanes.post(step, early=reducing.early, stale=self._owns_stale(), only=only)
        for block in self.lanes.blocks:
            basis = self._window_basis[block].version
            self.depot.prune(block, self.lanes.backlog.oldest_basis(block, basis))

    def _waits(self, early: bool) -> bool:
        return early or self.config.install_delay is not None or self._replay is not None

    def _begin_poll(self, step: int, plan: Plan, grads: Sequence[Tensor], settings: int) -> None:
        replay = self._replay
        if replay is not None:
            self.lanes.settle()

        def resident(block: int) -> list[State] | None:
            states = self.depot.states(block)
            if replay is not None:
                wanted = replay.version_at(block, self.timetable.install_step(step))
                return [state for state in states if wanted is not None and state.version <= wanted]
            if plan.based_on is not None:
                if self.depot.lost(block, plan.based_on):
                    return None
                return [state for state in states if state.through <= plan.based_on]
            return states

        # Where all ranks are in the step together, its start compared the fingerprint.
        prints = Prints(0 if plan.together else self._print.take(grads), settings)
        self._switch.begin_poll(step, prints, resident)

    def _install(self, step: int) -> list[Install]:
        installs = self._switch.finish(step)
        for install in installs:
            self.installed[install.block] = install
            own = (install.version, install.since, install.through)
            for version in (*install.passed, own):
                self.install_log.append(Record(step, install.block, *version))
        if installs:
            fields = {
                "blocks": [i.block for i in installs],
                "versions": [i.version for i in installs],
                "based_on": [i.through for i in installs],
            }
            self.emit("install", step=step, route=installs[0].route, **fields)
        return installs

    # -- staleness ------------------------------------------------------------------------

    def staleness(self, block: int) -> int:
        """Steps from the one that the installed version is based on to the one begun last."""
        return staleness(self.installed[block], self._begun)

    def too_stale(self, block: int) -> bool:
        """Whether a block's staleness has passed its bound (the same on all ranks)."""
        return self.staleness(block) > self.timetable.staleness_bound(self._begun)

    def _owns_stale(self) -> bool:
        fallback = self.config.staleness_policy == "fallback"
        return fallback and any(self.too_stale(block) for block in self.lanes.blocks)

    # -- ending ---------------------------------------------------------------------------

    def close(self, timeout: float = 2.0) -> None:
        """End the threads and links of this rank; local and idempotent."""
        if self._closed:
            return
        self._closed = True
        self._give_up(self.window.restart(self.step_count), "closed")
        if self._reducing is not None:
            self._give_up(self._reducing.closed.captures, "closed")
        self._finalizer.detach()
        self.lanes.close(timeout)

    def _give_up(self, captures: int, reason: str) -> None:
        """Count statistics that were observed here and never came into the backlog."""
        self.depot.count(observed=captures * len(self.lanes.blocks))
        self.depot.drop(self.lanes.blocks, captures, reason)

    def restore(self, step: int, installed: list[Install]) -> None:
        """Take over restored versions.  Collectives under way are completed and discarded."""
        if self._reducing is not None:
            self.group.finish(self._reducing.works)
            self._give_up(self._reducing.closed.captures, "state_dict loaded")
            self._reducing = None
        self._switch.abandon()
        self._give_up(self.window.restart(step), "state_dict loaded")
        self.lanes.reseed()
        self.step_count, self._begun = step, max(0, step - 1)
        self.installed = list(installed)
        self._window_basis = list(installed)
