"""Real worker processes over tcp: ready file, draining, restarts, and owners that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from worker_fakes import OTHER_JOB
from worker_owner import DEADLINE_S, LOWRANK, Owner, refresh_directly, start_flat, statistic_flat

from distcurv.curvature.kinds import KINDS
from distcurv.errors import ConfigError, EndpointError
from distcurv.wire.messages import Ack, Error, Goodbye, Published, Welcome
from distcurv.worker.main import serve

# Gives its last words time to leave a busy machine, and notes why sessions ended.
WORKER = """
import sys
from pathlib import Path
from distcurv.worker import loop
from distcurv.worker.main import serve
from distcurv.worker.settings import WorkerSettings

loop.LAST_WORDS = 2.0
settings = WorkerSettings(heartbeat=0.1, session_timeout=float(sys.argv[3]))

def note(kind, **fields):
    if kind == "session" and fields["state"] == "closed":
        with Path(sys.argv[2]).with_suffix(".ends").open("a") as ends:
            print(fields["reason"], file=ends)

sys.exit(serve(sys.argv[1], ready_file=sys.argv[2], settings=settings, emit=note))
"""
PATIENT = "600"  # no session of a test that is held up ends by its silence

OWNER = """
import sys
from distcurv.wire.messages import Heartbeat
from worker_owner import LOWRANK, Owner

owner = Owner(sys.argv[1])
owner.open([LOWRANK])
print("open", flush=True)
while True:
    owner.link.receive(0.1)
    owner.send(Heartbeat(owner.session, 0.0, 0))
"""


class Started:
    """A child process; `endpoint` waits for the ready file."""

    def __init__(self, code: str, *words: str) -> None:
        paths = [str(Path.cwd()), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *words],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_S)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def launch() -> Iterator[Callable[..., Started]]:
    running: list[Started] = []

    def begin(code: str, *words: str) -> Started:
        running.append(Started(code, *words))
        return running[-1]

    yield begin
    for started in running:
        started.end()


@pytest.fixture
def join() -> Iterator[Callable[..., Owner]]:
    owners: list[Owner] = []

    def make(endpoint: str, **fields: object) -> Owner:
        owners.append(Owner(endpoint, **fields))  # type: ignore[arg-type]
        return owners[-1]

    yield make
    for owner in owners:
        owner.close()


def ready(worker: Started, ready_file: Path) -> str:
    """The endpoint, as printed; the ready file says the same."""
    endpoint = worker.line()
    deadline = time.monotonic() + DEADLINE_S
    while not ready_file.exists():
        assert time.monotonic() < deadline
        assert worker.process.poll() is None
        time.sleep(0.01)  # a file can only be polled for
    assert ready_file.read_text() == f"{endpoint}\n"
    return endpoint


def one_version(owner: Owner, version: int, newest: torch.Tensor, seq: int) -> torch.Tensor:
    """Send a statistic against ``version`` and check the next one bit for bit."""
    sent = statistic_flat(LOWRANK, newest, seed=version)
    owner.statistic(seq, {0: (version, sent)})
    assert owner.await_(Ack).numbers == [seq]
    published = owner.await_(Published, lambda message: message.versions == [version + 1])
    owner.acknowledge(published)
    views = KINDS[LOWRANK.kind].published_layout(LOWRANK).views(newest)
    _, expected = refresh_directly(LOWRANK, [views], [sent], [newest])
    assert torch.equal(published.payload, expected[0])
    return published.payload.clone()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_drains_says_goodbye_and_ends_with_code_0(
    launch, join, tmp_path: Path, number: signal.Signals
) -> None:
    worker = launch(WORKER, "tcp://127.0.0.1:0", str(tmp_path / "ready"), PATIENT)
    owner = join(ready(worker, tmp_path / "ready"))
    assert owner.open([LOWRANK]).pid == worker.process.pid
    newest = start_flat(LOWRANK)
    owner.seed({0: (0, newest)})
    one_version(owner, 0, newest, seq=0)
    worker.process.send_signal(number)
    owner.await_(Goodbye)
    assert worker.process.wait(DEADLINE_S) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"ready", "ready.ends"}, (
        "nothing partial is left"
    )


def test_after_sigkill_the_same_port_and_a_seed_continue_the_versions(
    launch, join, tmp_path: Path
) -> None:
    first = launch(WORKER, "tcp://127.0.0.1:0", str(tmp_path / "one"), PATIENT)
    endpoint = ready(first, tmp_path / "one")
    owner = join(endpoint)
    owner.open([LOWRANK])
    newest = start_flat(LOWRANK)
    owner.seed({0: (0, newest)})
    for version in range(2):
        newest = one_version(owner, version, newest, seq=version)
    first.process.kill()
    first.process.wait(DEADLINE_S)
    second = launch(WORKER, endpoint, str(tmp_path / "two"), PATIENT)
    assert ready(second, tmp_path / "two") == endpoint
    owner = join(endpoint)
    assert owner.open([LOWRANK]).pid == second.process.pid
    owner.statistic(0, {0: (2, statistic_flat(LOWRANK, newest, 2))})
    assert owner.await_(Error).code == "unknown_basis", (
        "a worker remembers nothing of its past life"
    )
    owner.seed({0: (2, newest)})
    one_version(owner, 2, newest, seq=1)


def test_an_owner_killed_with_sigkill_frees_the_worker_after_the_timeout(
    launch, join, tmp_path: Path
) -> None:
    worker = launch(WORKER, "tcp://127.0.0.1:0", str(tmp_path / "ready"), "5")
    endpoint = ready(worker, tmp_path / "ready")
    doomed = launch(OWNER, endpoint)
    assert doomed.line() == "open"
    second = join(endpoint, job=OTHER_JOB)
    second.greet([LOWRANK])
    assert second.await_(Error).code == "busy"
    doomed.process.kill()
    deadline = time.monotonic() + DEADLINE_S
    while True:
        second.greet([LOWRANK])
        answer = second.link.receive(5.0)
        if isinstance(answer, Welcome):
            break
        assert answer is None or (isinstance(answer, Error) and answer.code == "busy")
        assert time.monotonic() < deadline, "still busy"
        second.link.receive(0.1)  # nothing comes: this only spaces the attempts
    # Not its broken connection: an owner may come back over another one.
    assert (tmp_path / "ready.ends").read_text() == "nothing heard for 5.0 s\n"


def test_bad_values_are_refused_before_anything_is_bound() -> None:
    threads = torch.get_num_threads()
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(EndpointError, match="CURVE"):
        serve("tcp://0.0.0.0:0", emit=print, threads=threads)
    with pytest.raises(EndpointError):
        serve("carrier-pigeon://loft", emit=print, threads=threads)
    with pytest.raises(ConfigError, match="cuda:63"):
        serve("tcp://127.0.0.1:0", emit=print, device="cuda:63")
    with pytest.raises(ConfigError, match="threads"):
        serve("tcp://127.0.0.1:0", emit=print, threads=0)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
