"""What a worker or its link may do to a run: training goes on, nothing torn is installed, and once
the fault is over new versions of the worker are installed."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from distributed_jobs import until
from distributed_links import CuttingProxy, DelayedLink, MouthWorker, wrapped_links
from distributed_tasks import Run, make_model, observed_all_accounted

from distcurv.errors import LinkError
from distcurv.launcher.supervisor import Supervisor
from distcurv.wire.messages import Message, Published

# Fast enough for a test; a worker's own heartbeat comes every second.
SETTINGS: dict[str, Any] = {
    "preconditioner_upd_interval": 5,
    "curvature_upd_interval": 1,
    "early_steps": 0,
    "link_timeout": 2.5,
    "heartbeat": 0.3,
}
DEADLINE_S = 120.0

Condition = Callable[[dict[str, float | int]], bool]


@pytest.fixture
def mortal() -> Iterator[Supervisor]:
    """A worker that the test may kill; it comes back on its port at once."""
    with Supervisor(workers=1, restart_delays=(0.05, 0.2), report=lambda text: None) as supervisor:
        yield supervisor


@contextmanager
def free_endpoint() -> Iterator[str]:
    """Where nobody listens, and where in the body a worker can listen but nobody else will."""
    with socket.socket() as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(("127.0.0.1", 0))
        yield f"tcp://127.0.0.1:{keeper.getsockname()[1]}"


def train_until(run: Run, condition: Condition, what: str) -> None:
    """Train until the run's metrics satisfy the condition; every step's numbers must be sound."""
    end = time.monotonic() + DEADLINE_S
    while not condition(run.metrics()):
        run.steps(1)
        assert time.monotonic() < end, f"not within {DEADLINE_S:g} s: {what}: {run.metrics()}"
    assert_sound(run)


def assert_sound(run: Run) -> None:
    """Parameters and all that is installed are finite; bases are orthonormal; versions grow."""
    for param in run.params():
        assert torch.isfinite(param).all()
    for tensors in run.versions().values():
        for name, tensor in tensors.items():
            assert torch.isfinite(tensor).all(), name
            if name.endswith(".U"):
                gram = tensor.mT @ tensor
                assert (gram - torch.eye(gram.shape[-1])).abs().max() < 1e-3, name
    newest: dict[int, int] = {}
    for step, block, version, since, through in run.door.install_log:
        assert version == newest.get(block, 0) + 1
        assert since <= through <= step
        newest[block] = version


def from_workers(run: Run, more: int = 6) -> Condition:
    """More versions of the worker than the run has now."""
    wanted = run.metrics()["versions_from_workers"] + more
    return lambda metrics: metrics["versions_from_workers"] >= wanted


def installed(run: Run, more: int = 6) -> Condition:
    wanted = run.metrics()["versions_installed"] + more
    return lambda metrics: metrics["versions_installed"] >= wanted


def sessions(run: Run) -> int:
    """How many the run has opened with its one worker."""
    (lane,) = run.door._pipeline.lanes.lanes
    return lane.remote.sessions


def assert_accounted(run: Run) -> None:
    run.close()
    assert observed_all_accounted(run.metrics()), run.metrics()


@pytest.mark.parametrize("door", ["kfac", "soap"])
def test_a_killed_worker_is_restarted_and_serves_again(mortal: Supervisor, door: str) -> None:
    with Run(door, mortal.endpoints, **SETTINGS) as run:
        train_until(run, from_workers(run), "versions of the first worker")
        before = sessions(run)
        (pid,) = mortal.pids
        os.kill(pid, signal.SIGKILL)
        # It is gone while training goes on; the link is lost, and up again in another session.
        train_until(run, lambda metrics: sessions(run) > before, "another session")
        train_until(run, lambda metrics: metrics["links_up"] == 1, "the link is up again")
        train_until(run, from_workers(run), "versions of the second worker")
        train_until(run, installed(run), "they are installed")
        assert mortal.pids != [pid]
        assert_accounted(run)


def stopped_for(mortal: Supervisor, seconds: float, **settings: Any) -> list[float | int]:
    """At least so long, and until the session is given up; the stop does not stop the training.

    Returns how many versions had come of the worker when it went on, and in the end."""
    with Run("kfac", mortal.endpoints, **{**SETTINGS, **settings}) as run:
        train_until(run, from_workers(run), "versions before the stop")
        (pid,) = mortal.pids
        os.kill(pid, signal.SIGSTOP)
        try:
            end, least = time.monotonic() + seconds, run.step_count + 20
            train_until(run, lambda metrics: metrics["links_up"] == 0, "the session is given up")
            train_until(
                run,
                lambda metrics: time.monotonic() >= end and run.step_count >= least,
                "steps without a worker",
            )
        finally:
            os.kill(pid, signal.SIGCONT)
        came = [run.metrics()["versions_from_workers"]]
        train_until(run, from_workers(run), "versions after the stop")
        train_until(run, installed(run), "they are installed")
        assert_accounted(run)
        return [*came, run.metrics()["versions_from_workers"]]


def test_a_worker_that_stops_and_goes_on(mortal: Supervisor) -> None:
    before, after = stopped_for(mortal, 0.0)
    assert after > before


@pytest.mark.slow
def test_a_worker_that_stops_for_ten_seconds(mortal: Supervisor) -> None:
    """With the timeouts of a user."""
    before, after = stopped_for(mortal, 10.0, link_timeout=5.0, heartbeat=1.0)
    assert after > before


def plain_sgd(steps: int, lr: float = 0.01) -> list[torch.Tensor]:
    """Parameters after steps of SGD alone."""
    run = Run("kfac", "inline", lr=lr, early_steps=0, preconditioner_upd_interval=10**6)
    with run:
        for _ in range(steps):
            run.backward()
            assert run.base is not None
            run.base.step()
    return run.params()


def test_without_a_worker_preconditioner_leaves_gradients_alone_and_warns_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        free_endpoint() as endpoint,
        caplog.at_level(logging.WARNING),
        Run("kfac", [endpoint], **SETTINGS) as run,
    ):
        for _ in range(60):
            run.backward()
            before = run.grads()
            run.update()
            after = run.grads()
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert run.metrics()["versions_installed"] == 0
        warned = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        assert len(warned) == 1, warned
        assert endpoint in warned[0] and "training goes on" in warned[0]
        wanted = plain_sgd(60)
        assert all(torch.equal(a, b) for a, b in zip(run.params(), wanted, strict=True))
        # It comes up later.
        with MouthWorker(endpoint=endpoint):
            train_until(run, from_workers(run), "versions of the late worker")
            train_until(run, installed(run), "they are installed")
            assert_accounted(run)
    assert any(not torch.equal(a, b) for a, b in zip(run.params(), wanted, strict=True))


def test_without_a_worker_soap_refreshes_in_process_and_warns_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # However late a refresh is on a busy machine, there is no warning of that.
    settings = {**SETTINGS, "max_staleness": 10**6}
    with (
        free_endpoint() as endpoint,
        caplog.at_level(logging.WARNING),
        Run("soap", [endpoint], **settings) as run,
    ):
        train_until(run, installed(run, 12), "versions made in process")
        assert run.metrics()["versions_from_workers"] == 0
        assert run.metrics()["versions_inline"] >= 12
        warned = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        # A busy machine may add that versions are stale, which is another matter.
        unreachable = [text for text in warned if not text.startswith("staleness")]
        assert len(unreachable) == 1, warned
        assert "refreshing in process" in unreachable[0]
        with MouthWorker(endpoint=endpoint):
            train_until(run, from_workers(run), "versions of the late worker")
            train_until(run, installed(run), "they are installed")
            assert_accounted(run)


def test_a_worker_killed_while_a_message_is_half_sent(mortal: Supervisor) -> None:
    """The connection breaks inside the first Published: what came of it is never seen."""
    wide = (40, 48, 40)

    def kill() -> None:
        for pid in mortal.pids:
            os.kill(pid, signal.SIGKILL)

    # Greeting and Welcome are some hundred bytes, the first Published some 20 KB.
    settings = {**SETTINGS, "rank": 24, "preconditioner_upd_interval": 8}
    with (
        CuttingProxy(mortal.endpoints[0], cut_after=6_000, on_cut=kill) as proxy,
        Run("kfac", [proxy.endpoint], dims=wide, **settings) as run,
    ):
        train_until(run, lambda metrics: proxy.cut.is_set(), "the cut")
        assert run.metrics()["versions_from_workers"] == 0
        train_until(run, lambda metrics: metrics["statistics_dropped"] > 0, "the loss is counted")
        assert run.metrics()["versions_from_workers"] == 0
        train_until(run, from_workers(run), "versions of the second worker")
        train_until(run, installed(run), "they are installed")
        assert_accounted(run)


def test_a_slow_link(worker: Supervisor) -> None:
    def slow(link: Any, rank: int) -> Any:
        return DelayedLink(link, seed=3, longest=0.1)

    with wrapped_links(slow), Run("kfac", worker.endpoints, **SETTINGS) as run:
        train_until(run, from_workers(run, 3), "versions over a slow link")
        train_until(run, installed(run, 3), "they are installed")
        assert_accounted(run)


def of_published(change: Callable[[Published], Any]) -> Callable[[Message], Any]:
    return lambda message: change(message) if isinstance(message, Published) else message


def wrong(**fields: Callable[[Any], Any]) -> Callable[[Message], Any]:
    """A lie that changes some fields of every Published."""
    return of_published(
        lambda message: dataclasses.replace(
            message, **{name: change(getattr(message, name)) for name, change in fields.items()}
        )
    )


def one_number(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def poison(payload: torch.Tensor) -> torch.Tensor:
        payload = payload.clone()
        payload[len(payload) // 2] = value
        return payload

    return poison


LIES: dict[str, Callable[[Message], Any]] = {
    "too-short": wrong(payload=lambda payload: payload[:-1]),
    "too-long": wrong(payload=lambda payload: torch.cat([payload, payload[:1]])),
    "nan": wrong(payload=one_number(float("nan"))),
    "infinite": wrong(payload=one_number(float("inf"))),
    "old-version": wrong(versions=lambda versions: [v - 1 for v in versions]),
    "future-version": wrong(versions=lambda versions: [v + 1 for v in versions]),
    "other-session": wrong(session=lambda session: bytes(16)),
    "other-seq": wrong(seqs=lambda seqs: [s + 1 for s in seqs]),
    "unknown-block": wrong(blocks=lambda blocks: [b + 100 for b in blocks]),
    "other-block": wrong(blocks=lambda blocks: [(b + 1) % 3 for b in blocks]),
}


class Liar:
    """Says lies until it is told to be honest; counts them."""

    def __init__(self, lie: Callable[[Message], Any]) -> None:
        self._lie = lie
        self.honest = threading.Event()
        self.lies = 0

    def __call__(self, message: Message) -> Sequence[Message]:
        if self.honest.is_set() or not isinstance(message, Published):
            return [message]
        self.lies += 1
        return [self._lie(message)]


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_never_installed_and_the_truth_is_afterwards(name: str) -> None:
    liar = Liar(LIES[name])
    with MouthWorker(liar) as mouth, Run("kfac", [mouth.endpoint], **SETTINGS) as run:
        train_until(run, lambda metrics: liar.lies >= 3, "three lies")
        run.steps(20)
        before = run.versions()
        assert run.metrics()["versions_from_workers"] == 0
        assert run.metrics()["versions_installed"] == 0
        liar.honest.set()
        train_until(run, from_workers(run), "true versions")
        train_until(run, installed(run), "they are installed")
        assert any(
            not torch.equal(run.versions()[block][key], tensor)
            for block, tensors in before.items()
            for key, tensor in tensors.items()
        )
        assert_accounted(run)


def test_a_version_that_is_told_twice_is_installed_once() -> None:
    def twice(message: Message) -> Sequence[Message]:
        return [message, message] if isinstance(message, Published) else [message]

    with MouthWorker(twice) as mouth, Run("kfac", [mouth.endpoint], **SETTINGS) as run:
        train_until(run, installed(run, 9), "versions")
        assert_accounted(run)


def test_the_link_refuses_the_training_thread(worker: Supervisor) -> None:
    with Run("kfac", worker.endpoints, **SETTINGS) as run:
        train_until(run, lambda metrics: metrics["links_up"] == 1, "a session")
        (lane,) = run.door._pipeline.lanes.lanes
        link = until(lambda: lane.remote._link, "the courier has a link")
        for use in (lambda: link.receive(0.0), lambda: link.send(None)):
            with pytest.raises(LinkError, match="only its I/O thread may"):
                use()
        train_until(run, installed(run), "the courier goes on")


def test_a_model_is_the_same_in_every_run_of_these_tests() -> None:
    """The comparisons above rest on it."""
    one, two = make_model(), make_model()
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
