"""Routes: the early phase, the worker, and the in-process fall-back."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from train_rig import (
    DEADLINE,
    Events,
    HonestWorker,
    ScriptedLink,
    filled_depot,
    make_table,
    wait_until,
)

from distcurv.config import ServiceConfig
from distcurv.errors import StateError
from distcurv.train import lanes as lanes_module
from distcurv.train.backlog import Span
from distcurv.train.lanes import Lanes, OwnerLinks
from distcurv.wire import Link
from distcurv.wire.messages import Error, Message, Seed, Statistics


class Rig:
    """An owner's lanes with scripted services; each post sends one window of ones."""

    def __init__(self) -> None:
        self.events = Events()
        self.table = make_table(4)
        self.depot = filled_depot(self.table, self.events)
        self.inline_worker = HonestWorker(self.table)
        self.inline_links: list[ScriptedLink] = []
        self.workers: list[HonestWorker] = []
        self.remote_links: list[list[ScriptedLink]] = []
        self.reachable = True
        self.closed = 0
        self.released = threading.Event()
        self.lanes: Lanes | None = None
        self.step = 0

    def make(self, remotes: int, *, fallback: bool = True, **settings: object) -> Lanes:
        # Scripted workers are silent.
        defaults = {"heartbeat": 0.05, "link_timeout": 10 * DEADLINE, "wait_timeout": DEADLINE}
        config = ServiceConfig(**(defaults | settings))  # type: ignore[arg-type]
        self.workers = [HonestWorker(self.table) for _ in range(remotes)]
        self.remote_links = [[] for _ in range(remotes)]
        links = OwnerLinks(
            self.connect_inline,
            tuple((f"worker{i}", self.remote(i)) for i in range(remotes)),
            self.close_links,
        )
        self.lanes = Lanes(
            self.table, 0, links, self.depot, config, b"j" * 16, 0, self.events, fallback
        )
        return self.lanes

    def connect_inline(self) -> Link:
        self.inline_links.append(ScriptedLink(self.inline_worker, waits=True))
        return self.inline_links[-1]

    def remote(self, i: int) -> Callable[[], Link]:
        def connect() -> Link:
            if not self.reachable:
                raise OSError("connection refused")
            self.remote_links[i].append(ScriptedLink(self.workers[i], waits=True))
            return self.remote_links[i][-1]

        return connect

    def close_links(self) -> None:
        self.closed += 1

    def up(self, lane: int = 0) -> None:
        """Wait for a lane's worker."""
        assert self.lanes is not None
        remote = self.lanes.lanes[lane].remote
        assert remote is not None
        assert self.depot.wait(lambda: remote.up, DEADLINE)

    def post(self, *, early: bool = False, stale: bool = False, answered: bool = True) -> None:
        """One window; waits until all that was sent is answered."""
        assert self.lanes is not None
        size = sum(layout.size for layout in self.table.statistic_layouts)
        versions = [self.depot.states(b)[-1].version for b in range(len(self.table))]
        self.depot.count(observed=len(self.table))
        self.lanes.backlog.add(Span(self.step, self.step, 1), torch.ones(size), versions)
        self.lanes.post(self.step, early=early, stale=stale)
        if answered:
            self.lanes.settle()
        self.step += 1

    def newest(self) -> list[tuple[int, str]]:
        """Version and route of each block's newest state."""
        states = [self.depot.states(b)[-1] for b in range(len(self.table))]
        return [(s.version, s.route) for s in states]

    def balanced(self) -> bool:
        counts = self.depot.counts
        return counts.observed == counts.folded + counts.dropped


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.released.set()
    if rig.lanes is not None:
        rig.lanes.close(DEADLINE)


def test_the_early_phase_goes_to_the_in_process_service(rig: Rig) -> None:
    rig.make(1)
    rig.up()
    rig.post(early=True)
    assert rig.newest() == [(1, "inline")] * 4
    assert rig.remote_links[0][0].sent_of(Statistics) == []


def test_after_the_early_phase_the_worker_takes_over_from_the_newest_state(rig: Rig) -> None:
    rig.make(1)
    rig.up()
    rig.post(early=True)
    rig.post(early=True)
    rig.post()
    assert rig.newest() == [(3, "worker")] * 4
    (seed,) = rig.remote_links[0][0].sent_of(Seed)
    assert sorted(set(seed.versions)) == [0, 1, 2]
    assert rig.depot.counts.dropped == 0


def test_without_workers_everything_is_refreshed_in_process(rig: Rig) -> None:
    rig.make(0)
    rig.post(early=True)
    rig.post()
    assert rig.newest() == [(2, "inline")] * 4
    assert rig.events.of("warning") == []


def test_the_in_process_service_is_not_started_before_it_is_needed(rig: Rig) -> None:
    rig.make(1)
    rig.up()
    rig.post()
    assert rig.newest() == [(1, "worker")] * 4
    assert rig.inline_links == []


def test_two_workers_share_the_blocks(rig: Rig) -> None:
    lanes = rig.make(2)
    rig.up(0)
    rig.up(1)
    assert [lane.blocks for lane in lanes.lanes] == [[0, 2], [1, 3]]
    rig.post()
    assert rig.newest() == [(1, "worker")] * 4
    assert [len(links[0].sent_of(Statistics)) for links in rig.remote_links] == [1, 1]


def test_more_workers_than_blocks_leave_some_idle(rig: Rig) -> None:
    assert len(rig.make(6).lanes) == 4


def test_an_absent_worker_is_replaced_in_process_with_one_warning(rig: Rig) -> None:
    rig.reachable = False
    rig.make(1)
    for _ in range(3):
        rig.post()
    assert rig.newest() == [(3, "inline")] * 4
    (warning,) = rig.events.of("warning")
    assert "no curvature worker reachable at worker0" in str(warning["text"])
    assert "refreshing in process" in str(warning["text"])


def test_without_fall_back_statistics_wait_for_the_worker(rig: Rig) -> None:
    rig.reachable = False
    lanes = rig.make(1, fallback=False)
    for _ in range(3):
        rig.post()
    assert rig.newest() == [(0, "inline")] * 4
    assert rig.inline_links == []
    (warning,) = rig.events.of("warning")
    assert "with what is installed" in str(warning["text"])
    assert lanes.backlog.steps() == 12
    rig.reachable = True
    rig.up()
    rig.post()
    assert rig.newest() == [(1, "worker")] * 4
    assert rig.depot.counts.folded == 16


def test_a_worker_that_comes_back_is_used_again_from_the_newest_state(rig: Rig) -> None:
    rig.reachable = False
    rig.make(1)
    rig.post()
    rig.reachable = True
    rig.up()
    rig.post()
    assert rig.newest() == [(2, "worker")] * 4
    (seed,) = rig.remote_links[0][0].sent_of(Seed)
    assert max(seed.versions) == 1


def test_while_a_statistic_is_in_flight_later_ones_add_up(rig: Rig) -> None:
    lanes = rig.make(1)
    rig.up()
    rig.workers[0].speaks = False
    for _ in range(3):
        rig.post(answered=False)
    assert rig.depot.in_flight_steps() == 4
    assert lanes.backlog.steps() == 8
    (flight,) = {rig.depot.in_flight(b) for b in range(4)}
    assert flight is not None
    link = rig.remote_links[0][0]
    wait_until(lambda: link.sent_of(Statistics), "the statistic to leave")
    (sent,) = link.sent_of(Statistics)
    rig.workers[0].speaks = True
    link.say(rig.workers[0].publish(sent))
    lanes.settle()
    rig.post()  # its own statistic is against the version that came meanwhile: it waits
    assert [(s.since, s.through) for s in rig.depot.states(0)] == [(-1, -1), (0, 0), (1, 2)]
    assert rig.depot.counts.folded == 12
    assert lanes.backlog.steps() == 4


def test_past_the_staleness_bound_blocks_go_in_process_and_return_later(rig: Rig) -> None:
    lanes = rig.make(1, max_staleness=3)
    rig.up()
    rig.workers[0].speaks = False
    rig.post(answered=False)  # step 0
    rig.post(stale=True)  # step 1: the worker is avoided until step 4
    assert [route for _, route in rig.newest()] == ["inline"] * 4
    assert rig.depot.counts.dropped == 4  # what the worker had
    rig.workers[0].speaks = True
    for _ in range(2):  # steps 2 and 3
        rig.post()
        assert [route for _, route in rig.newest()] == ["inline"] * 4
    rig.post()  # step 4
    assert [route for _, route in rig.newest()] == ["worker"] * 4
    assert lanes.backlog.steps() == 0
    assert rig.balanced()
    assert rig.events.of("warning") == []  # the worker was reachable all the time


def test_without_fall_back_staleness_changes_no_route(rig: Rig) -> None:
    rig.make(1, fallback=False, max_staleness=3)
    rig.up()
    rig.post(stale=True)
    rig.post(stale=True)
    assert rig.newest() == [(2, "worker")] * 4


def test_the_deterministic_mode_waits_for_its_worker_and_never_falls_back(rig: Rig) -> None:
    rig.make(1, install_delay=4)
    rig.post()
    assert rig.newest() == [(1, "worker")] * 4
    assert rig.inline_links == []


def test_the_deterministic_mode_says_what_it_waited_for(rig: Rig) -> None:
    rig.reachable = False
    lanes = rig.make(1, install_delay=4, wait_timeout=0.3)
    (lane,) = lanes.lanes
    wait_until(lambda: lane.remote is not None and lane.remote.last_error, "the first attempt")
    with pytest.raises(StateError, match=r"0.3 s for worker worker0 to answer.*connection refused"):
        rig.post()


def test_settling_may_leave_what_is_based_on_later_steps(rig: Rig) -> None:
    lanes = rig.make(1, wait_timeout=0.3)
    rig.up()
    rig.workers[0].speaks = False
    rig.step = 8
    rig.post(answered=False)
    lanes.settle(through=7)
    with pytest.raises(StateError, match="a refresh to finish"):
        lanes.settle(through=8)


def test_replay_sends_only_what_the_log_says(rig: Rig) -> None:
    lanes = rig.make(0)
    size = sum(layout.size for layout in rig.table.statistic_layouts)
    lanes.backlog.add(Span(0, 0, 1), torch.ones(size), [0] * 4)
    lanes.post(0, early=False, stale=False, only={1, 2})
    lanes.settle()
    assert [version for version, _ in rig.newest()] == [0, 1, 1, 0]
    assert lanes.backlog.steps() == 2


def test_reseeding_gives_up_everything(rig: Rig) -> None:
    lanes = rig.make(1)
    rig.up()
    rig.post()
    rig.workers[0].speaks = False
    rig.post(answered=False)
    rig.post(answered=False)
    lanes.reseed()
    assert rig.depot.in_flight_steps() == 0
    assert lanes.backlog.steps() == 0
    assert rig.balanced()
    rig.workers[0].speaks = True
    rig.post()
    assert rig.newest() == [(2, "worker")] * 4
    assert len(rig.remote_links[0][0].sent_of(Seed)) == 2


def test_closing_counts_what_waits_and_what_is_in_flight(rig: Rig) -> None:
    lanes = rig.make(1)
    rig.up()
    rig.workers[0].speaks = False
    rig.post(answered=False)
    rig.post(answered=False)
    lanes.close(DEADLINE)
    assert rig.depot.counts.dropped == 8
    assert rig.balanced()
    assert rig.closed == 1


def test_closing_counts_what_a_hanging_link_holds(rig: Rig) -> None:
    class Hanging(ScriptedLink):
        def receive(self, timeout: float) -> Message | None:
            if self.sent_of(Statistics):
                rig.released.wait()
                raise OSError("released")
            return super().receive(timeout)

    lanes = rig.make(1)
    rig.workers[0].speaks = False
    links = OwnerLinks(
        rig.connect_inline,
        (("hanging", lambda: Hanging(rig.workers[0], waits=True)),),
        rig.close_links,
    )
    lanes.close(DEADLINE)
    config = ServiceConfig(heartbeat=0.05, link_timeout=10 * DEADLINE)
    rig.lanes = Lanes(rig.table, 0, links, rig.depot, config, b"j" * 16, 0, rig.events, True)
    rig.up()
    rig.post(answered=False)
    assert rig.depot.in_flight_steps() == 4
    rig.lanes.close(0.05)
    assert rig.depot.in_flight_steps() == 0
    assert rig.balanced()


def test_a_window_too_large_for_one_message_travels_in_several(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.make(1)
    rig.up()
    block = 4 * rig.table.statistic_layouts[0].size
    monkeypatch.setattr(lanes_module, "MESSAGE_BYTES", 3 * block)
    rig.post()
    rig.post()
    sent = rig.remote_links[0][0].sent_of(Statistics)
    assert [message.blocks for message in sent] == [[0, 1, 2], [3]] * 2
    assert [message.seq for message in sent] == [0, 1, 2, 3]
    assert max(4 * message.payload.numel() for message in sent) <= 3 * block
    assert rig.newest() == [(2, "worker")] * 4
    assert rig.balanced()


def test_a_block_larger_than_the_limit_goes_alone(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.make(1)
    rig.up()
    monkeypatch.setattr(lanes_module, "MESSAGE_BYTES", 1)
    rig.post()
    sent = rig.remote_links[0][0].sent_of(Statistics)
    assert [message.blocks for message in sent] == [[0], [1], [2], [3]]


def test_an_in_process_service_that_refuses_is_named_with_its_reason(rig: Rig) -> None:
    class Refusing:
        def __call__(self, message: Message) -> list[Message | Exception]:
            return [Error(b"", "too_large", "no room for so many", [], 0)]

    def said() -> str:
        with pytest.raises(StateError, match="in-process service to start") as raised:
            rig.post()
        return str(raised.value)

    rig.make(0, wait_timeout=0.5)
    rig.inline_worker = Refusing()  # type: ignore[assignment]
    wait_until(lambda: "no room for so many" in said(), "the reason")


def test_a_forked_child_leaves_links_and_workers_to_its_parent(rig: Rig) -> None:
    lanes = rig.make(1)
    rig.up()
    child = os.fork()
    if child == 0:
        lanes.close(DEADLINE)
        os._exit(rig.closed)  # how often the workers were ended
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    rig.post()
    assert rig.newest() == [(1, "worker")] * 4
