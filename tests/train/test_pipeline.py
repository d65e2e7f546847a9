"""The pipeline in one process, over memory links."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from train_rig import DEADLINE, Events, HonestWorker, ScriptedLink, block_spec, wait_until

from distcurv.config import ServiceConfig
from distcurv.curvature.spec import Tensors
from distcurv.curvature.statistics import encode_gradient
from distcurv.errors import StateError
from distcurv.train import provider
from distcurv.train.group import RankGroup
from distcurv.train.lanes import OwnerLinks
from distcurv.train.pipeline import Pipeline
from distcurv.train.placement import Load
from distcurv.wire import Link
from distcurv.wire.messages import Hello, Message, Statistics, Welcome
from distcurv.wiring import InlineService

CPU = torch.device("cpu")
SPECS = [block_spec("a"), block_spec("b", (5, 7))]


class Services:
    """An in-process service and a worker for each pipeline, both real, behind memory links."""

    def __init__(self) -> None:
        self.events = Events()
        self.reachable = True
        self._started: list[InlineService] = []

    def start(self) -> InlineService:
        self._started.append(InlineService(CPU, Events()))
        return self._started[-1]

    def connector(self, remote: bool | Callable[[], Link]) -> provider.Connector:
        """``remote``: whether there is a worker, or how to connect to another one."""

        def links(workers: provider.Workers, group: RankGroup, load: Load) -> OwnerLinks:
            inline, worker = self.start(), self.start()

            def connect() -> Link:
                if not self.reachable:
                    raise OSError("connection refused")
                return remote() if callable(remote) else worker.connect()

            def close() -> None:
                inline.close()
                worker.close()

            remotes = (("memory worker", connect),) if remote else ()
            return OwnerLinks(inline.connect, remotes, close)

        return links

    def close(self) -> None:
        for service in self._started:
            service.close()


Make = Callable[..., Pipeline]


@pytest.fixture
def services() -> Iterator[Services]:
    services = Services()
    yield services
    services.close()


@pytest.fixture
def make(
    services: Services,
    connect_with: Callable[[provider.Connector], None],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Make]:
    """Makes pipelines and closes them."""
    made: list[Pipeline] = []
    monkeypatch.setattr(provider, "_events", [lambda who: services.events])

    def build(
        *,
        remote: bool | Callable[[], Link] = False,
        fallback: bool = True,
        replay: Sequence[Sequence[int]] | None = None,
        **config: Any,
    ) -> Pipeline:
        connect_with(services.connector(remote))
        defaults = {
            "preconditioner_upd_interval": 4,
            "early_steps": 0,
            "rank": 2,
            "heartbeat": 0.05,
            "link_timeout": 10 * DEADLINE,  # scripted workers are silent
            "wait_timeout": DEADLINE,
        }
        pipeline = Pipeline(
            SPECS,
            ServiceConfig(**(defaults | config)),  # type: ignore[arg-type]
            device=CPU,
            replicated=True,
            workers="inline",
            inline_fallback=fallback,
            replay=replay,
        )
        made.append(pipeline)
        return pipeline

    yield build
    for pipeline in made:
        pipeline.close(DEADLINE)


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    shapes = [tuple(side.dim for side in spec.sides[::-1]) for spec in SPECS]
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def run(pipeline: Pipeline, steps: int) -> None:
    """Training steps; gradients depend on the step's number alone."""
    for _ in range(steps):
        grads = gradients(pipeline.step_count)
        if pipeline.capture_due:
            for block, grad in enumerate(grads):
                basis = pipeline.basis(block).tensors
                pipeline.add(block, encode_gradient(pipeline.table.specs[block], grad, basis))
        pipeline.step(grads)


def up(pipeline: Pipeline) -> None:
    (lane,) = pipeline.lanes.lanes
    assert lane.remote is not None
    remote = lane.remote
    assert pipeline.depot.wait(lambda: remote.up, DEADLINE)


def flats(pipeline: Pipeline) -> list[torch.Tensor]:
    return [install.flat for install in pipeline.installed]


def versions(pipeline: Pipeline) -> list[int]:
    return [install.version for install in pipeline.installed]


def balanced(pipeline: Pipeline) -> bool:
    counts = pipeline.depot.counts
    return counts.observed == counts.folded + counts.dropped


# -- the rhythm ---------------------------------------------------------------------------


def test_before_the_first_install_the_start_is_random_and_from_the_seed_alone(make: Make) -> None:
    first, same, other = make(), make(), make(seed=1)
    assert versions(first) == [0, 0]
    for a, b, c in zip(flats(first), flats(same), flats(other), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_the_deterministic_mode_installs_exactly_k_steps_later(make: Make) -> None:
    pipeline = make(install_delay=3)
    run(pipeline, 16)
    expected = [(3, 1, 0, 0), (7, 2, 1, 4), (11, 3, 5, 8), (15, 4, 9, 12)]
    for block in range(2):
        records = [r for r in pipeline.install_log.records() if r.block == block]
        assert [(r.step, r.version, r.folded_from, r.folded_through) for r in records] == expected


def test_early_steps_install_within_the_step(make: Make) -> None:
    pipeline = make(early_steps=8, early_interval=2, install_delay=3)
    run(pipeline, 8)
    installs = [(r.step, r.folded_through) for r in pipeline.install_log.records() if r.block == 0]
    assert installs == [(0, 0), (2, 2), (4, 4), (6, 6)]


def test_windows_are_against_the_installed_basis(make: Make) -> None:
    pipeline = make()
    for step in range(30):
        closes = pipeline.timetable.plan(step).actions
        run(pipeline, 1)
        if closes and step % 4 == 2:
            assert [pipeline.basis(b).version for b in range(2)] == versions(pipeline)
    assert versions(pipeline)[0] >= 4


def test_what_is_installed_is_what_is_returned_and_reported(make: Make, services: Services) -> None:
    pipeline = make(install_delay=0)
    returned = []
    for step in range(6):
        run(pipeline, 1)
        returned += pipeline.step(gradients(step)) if step == 3 else []
    assert [(i.block, i.version, i.step, i.through) for i in returned] == [
        (0, 2, 4, 4),
        (1, 2, 4, 4),
    ]
    first, second = services.events.of("install")
    assert first["blocks"] == ["a", "b"]
    assert (first["versions"], second["versions"]) == ([1, 1], [2, 2])
    assert first["route"] == "inline"


def test_on_the_cpu_an_installed_version_is_kept_once(make: Make) -> None:
    pipeline = make(install_delay=3)
    run(pipeline, 9)
    assert versions(pipeline) == [2, 2]
    for block, install in enumerate(pipeline.installed):
        (state,) = [s for s in pipeline.depot.states(block) if s.version == install.version]
        assert state.flat.data_ptr() == install.flat.data_ptr()
        assert (state.since, state.through) == (install.since, install.through)


@pytest.mark.parametrize("delay", [None, 0, 3, 9])
def test_a_run_over_a_worker_link_equals_the_in_process_run(
    make: Make, services: Services, delay: int | None
) -> None:
    """Deterministic modes bit for bit; the asynchronous mode in its early phase."""
    early = 12 if delay is None else 0
    steps = 12 if delay is None else 40
    inline = make(install_delay=delay, early_steps=early)
    run(inline, steps)
    remote = make(install_delay=delay, early_steps=early, remote=True)
    run(remote, steps)
    assert inline.install_log.records() == remote.install_log.records()
    assert inline.install_log.installs >= 6
    for a, b in zip(flats(inline), flats(remote), strict=True):
        assert torch.equal(a, b)
    assert (remote.depot.counts.from_workers > 0) == (delay is not None)


def test_an_asynchronous_run_is_replayed_from_its_log(make: Make, services: Services) -> None:
    first = make(remote=True, early_steps=4, early_interval=2)
    up(first)
    for _ in range(10):
        run(first, 4)
        wait_until(lambda: not first.depot.in_flight_steps(), "the worker")
    first.close(DEADLINE)
    log = first.install_log.records()
    assert len(log) > 6
    again = make(early_steps=4, early_interval=2, replay=log)
    run(again, 40)
    assert again.install_log.digest() == first.install_log.digest()
    for a, b in zip(flats(first), flats(again), strict=True):
        assert torch.equal(a, b)


def test_after_the_early_phase_the_in_process_service_is_given_back(make: Make) -> None:
    """Its factors and bases of every block are the worker's to hold from there on."""
    pipeline = make(remote=True, early_steps=4, early_interval=2)
    up(pipeline)
    run(pipeline, 4)
    early = pipeline.lanes.inline
    assert early.up
    run(pipeline, 8)
    assert pipeline.lanes.inline is not early
    assert early.join(DEADLINE)
    assert not early.up
    wait_until(lambda: not pipeline.depot.in_flight_steps(), "the worker")
    run(pipeline, 8)
    assert pipeline.depot.counts.from_workers > 0


# -- staleness ----------------------------------------------------------------------------


class Mute:
    """A worker that takes statistics and never answers them."""

    def __init__(self, pipeline_table: Callable[[], Any]) -> None:
        self._table = pipeline_table

    def __call__(self) -> Link:
        worker: list[HonestWorker] = []

        def answer(message: Message) -> list[Message | Exception]:
            if not worker:
                worker.append(HonestWorker(self._table()))
                worker[0].speaks = False
            return worker[0](message)

        return ScriptedLink(answer, waits=True)


@pytest.fixture
def mute() -> Callable[[], Link]:
    from distcurv.train.table import BlockTable

    return Mute(lambda: BlockTable.make(SPECS, [0], 8))


def test_keep_goes_on_with_what_is_installed(
    make: Make, services: Services, mute: Callable[[], Link]
) -> None:
    pipeline = make(
        remote=mute,
        fallback=False,
        early_steps=1,
        max_staleness=9,
        staleness_policy="keep",
    )
    up(pipeline)
    run(pipeline, 40)
    assert versions(pipeline) == [1, 1]
    assert pipeline.staleness(0) == 39
    assert pipeline.too_stale(0)
    assert pipeline.staleness_watch.worst == 39
    (warning,) = services.events.of("warning")
    assert "staleness 10 is past max_staleness 9 at step 10: policy 'keep'" in str(warning["text"])


def test_fall_back_refreshes_in_process_past_the_bound(
    make: Make, services: Services, mute: Callable[[], Link]
) -> None:
    pipeline = make(
        remote=mute,
        fallback=True,
        early_steps=1,
        max_staleness=9,
        staleness_policy="fallback",
    )
    up(pipeline)
    run(pipeline, 11)
    assert versions(pipeline) == [1, 1]
    assert pipeline.depot.in_flight_steps() > 0
    for _ in range(12):
        run(pipeline, 1)
        flying = pipeline.lanes.lanes[0].active is pipeline.lanes.inline
        if flying:
            pipeline.lanes.settle()
    assert min(versions(pipeline)) >= 2
    assert pipeline.depot.counts.inline > 2
    assert pipeline.staleness_watch.worst <= 9 + 8
    assert len(services.events.of("warning")) == 1
    pipeline.close(DEADLINE)
    assert balanced(pipeline)


def test_before_the_first_install_nothing_is_stale(make: Make, mute: Callable[[], Link]) -> None:
    pipeline = make(remote=mute, fallback=False, max_staleness=3)
    run(pipeline, 20)
    assert versions(pipeline) == [0, 0]
    assert pipeline.staleness(0) == 0


# -- waiting ------------------------------------------------------------------------------


def test_the_deterministic_mode_without_a_worker_is_an_error_after_its_time(
    make: Make, services: Services
) -> None:
    services.reachable = False
    pipeline = make(remote=True, install_delay=2, wait_timeout=0.3)
    with pytest.raises(StateError, match=r"waited 0.3 s for worker memory worker .*install_delay"):
        run(pipeline, 4)


def test_the_deterministic_mode_with_a_mute_worker_too(
    make: Make, mute: Callable[[], Link]
) -> None:
    pipeline = make(remote=mute, install_delay=2, wait_timeout=0.3)
    up(pipeline)
    with pytest.raises(StateError, match=r"waited 0.3 s for a refresh to finish"):
        run(pipeline, 4)


def test_the_deterministic_mode_never_leaves_an_install_out_in_silence(make: Make) -> None:
    """A worker that dies with a statistic: the install that is due can never be made."""

    def deadly() -> Link:
        def answer(message: Message) -> list[Message | Exception]:
            if isinstance(message, Hello):
                return [Welcome(message.session, 1, "cpu")]
            return [OSError("gone")] if isinstance(message, Statistics) else []

        return ScriptedLink(answer, waits=True)

    pipeline = make(remote=deadly, install_delay=6)
    with pytest.raises(StateError, match=r"block a were lost .* install_delay cannot be kept"):
        run(pipeline, 7)
    assert versions(pipeline) == [0, 0]
    assert pipeline.step_count == 6, "the step at which the install was due"


def test_the_asynchronous_mode_never_waits_for_a_worker(
    make: Make, services: Services, mute: Callable[[], Link]
) -> None:
    """wait_timeout would raise where a step waited."""
    services.reachable = False
    absent = make(remote=True, fallback=False, wait_timeout=1e-9)
    run(absent, 50)
    services.reachable = True
    silent = make(remote=mute, fallback=False, wait_timeout=1e-9)
    up(silent)
    run(silent, 50)
    assert versions(absent) == versions(silent) == [0, 0]


def test_a_link_that_hangs_for_ever_does_not_stop_200_steps(make: Make) -> None:
    released = threading.Event()
    hangs = threading.Event()

    def connect() -> Link:
        hangs.set()
        released.wait()
        raise OSError("released")

    pipeline = make(remote=connect, fallback=False)
    try:
        run(pipeline, 200)
        assert hangs.wait(DEADLINE)
        pipeline.close(0.05)
        assert balanced(pipeline)
    finally:
        released.set()


# -- accounting ---------------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(12))
@pytest.mark.parametrize("delay", [None, 2])
def test_after_close_everything_observed_is_folded_or_dropped(
    make: Make, steps: int, delay: int | None
) -> None:
    pipeline = make(install_delay=delay, early_steps=3, early_interval=2)
    run(pipeline, steps)
    due = sum(pipeline.timetable.capture_due(step) for step in range(steps))
    pipeline.close(DEADLINE)
    assert pipeline.depot.counts.observed == 2 * due
    assert balanced(pipeline)
    assert pipeline.lanes.backlog.steps() == pipeline.depot.in_flight_steps() == 0


def test_with_a_worker_that_never_answers_memory_is_bounded_and_nothing_is_lost_silently(
    make: Make, mute: Callable[[], Link]
) -> None:
    pipeline = make(remote=mute, fallback=False)
    up(pipeline)
    run(pipeline, 200)
    bases = [len(queue) for queue in pipeline.lanes.backlog._queues.values()]
    assert max(bases) <= 2
    pipeline.close(DEADLINE)
    assert pipeline.depot.counts.observed == 200
    assert balanced(pipeline)


@settings(max_examples=15, deadline=None)
@given(
    outages=st.lists(st.tuples(st.integers(1, 12), st.booleans()), max_size=5),
    fallback=st.booleans(),
)
def test_accounting_holds_whatever_the_link_does(
    outages: list[tuple[int, bool]], fallback: bool
) -> None:
    """Sessions end and begin between steps, in any order; versions only grow."""
    services = Services()
    sessions: list[InlineService] = []

    def connect() -> Link:
        sessions.append(services.start())
        return sessions[-1].connect()

    saved = provider._connector[:]
    provider.register_connector(services.connector(connect))
    config = ServiceConfig(
        preconditioner_upd_interval=4, early_steps=2, rank=2, heartbeat=0.05, link_timeout=600.0
    )
    pipeline = Pipeline(
        SPECS, config, device=CPU, replicated=True, workers="inline", inline_fallback=fallback
    )
    try:
        before = versions(pipeline)
        for steps, reachable in outages:
            services.reachable = reachable
            if not reachable:
                for service in sessions:
                    service.close()  # says goodbye, the session is lost
            run(pipeline, steps)
            assert all(n >= o for n, o in zip(versions(pipeline), before, strict=True))
            before = versions(pipeline)
    finally:
        pipeline.close(DEADLINE)
        services.close()
        provider._connector[:] = saved
    assert balanced(pipeline)
    log = pipeline.install_log.records()
    for block in range(2):
        numbers = [r.version for r in log if r.block == block]
        assert numbers == list(range(1, len(numbers) + 1))


# -- ending -------------------------------------------------------------------------------


def test_a_step_after_close_is_an_error(make: Make) -> None:
    pipeline = make()
    run(pipeline, 3)
    pipeline.close(DEADLINE)
    pipeline.close(DEADLINE)
    with pytest.raises(StateError, match="after close"):
        pipeline.step(gradients(3))


def test_a_forgotten_pipeline_ends_its_threads(make: Make, services: Services) -> None:
    config = ServiceConfig(preconditioner_upd_interval=4, early_steps=4, rank=2)
    before = set(threading.enumerate())
    make(remote=True).close(DEADLINE)  # sets the connector
    pipeline = Pipeline(
        SPECS, config, device=CPU, replicated=True, workers="inline", inline_fallback=True
    )
    run(pipeline, 6)
    assert set(threading.enumerate()) - before
    del pipeline
    gc.collect()
    wait_until(lambda: not set(threading.enumerate()) - before, "the threads to end")


def test_statistics_reach_only_blocks_that_exist(make: Make) -> None:
    pipeline = make()
    statistic: Tensors = {"A.magic": torch.ones(())}
    with pytest.raises(ValueError, match="unknown fields"):
        pipeline.add(0, statistic)


def test_a_mute_worker_got_statistics(make: Make) -> None:
    """The scripted worker of the tests above is really spoken to."""
    from distcurv.train.table import BlockTable

    worker = HonestWorker(BlockTable.make(SPECS, [0], 8))
    worker.speaks = False
    links: list[ScriptedLink] = []

    def connect() -> Link:
        links.append(ScriptedLink(worker, waits=True))
        return links[-1]

    pipeline = make(remote=connect, fallback=False)
    up(pipeline)
    run(pipeline, 8)
    wait_until(lambda: links[0].sent_of(Statistics), "a statistic")
