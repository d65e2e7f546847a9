"""The one place where the training side meets the worker side.

Turns ``workers=`` into links: an in-process service tied to a memory link, endpoints from the
environment or the caller, or a worker process spawned on each node.  ``"auto"`` takes the
environment's endpoints; without them it asks `distcurv.train.placement` whether a worker pays.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence

import torch

from distcurv.errors import ConfigError, DistcurvError, LinkError, StateError
from distcurv.observe.events import from_environment
from distcurv.train.cores import from_vector, own_cores, spare_cores, to_vector
from distcurv.train.group import RankGroup
from distcurv.train.lanes import OwnerLinks
from distcurv.train.placement import WORKER, Load, choose
from distcurv.train.provider import Workers
from distcurv.wire import Link, Server, bind, connect
from distcurv.wire.endpoints import parse_connectable
from distcurv.worker.loop import run
from distcurv.worker.service import Service
from distcurv.worker.settings import WorkerSettings

log = logging.getLogger("distcurv")

ENDPOINTS_VARIABLE = "DISTCURV_ENDPOINTS"
_ENDPOINT_BYTES = 1024  # room for a node's endpoints when they are told to the other ranks


class InlineService:
    """A worker service in this process, started when it is first connected to."""

    def __init__(self, device: torch.device, emit: Callable[..., None]) -> None:
        self._device = device
        self._emit = emit
        self._lock = threading.Lock()
        self._server: Server | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def connect(self) -> Link:
        """A link to the service.  Raises `LinkError` after `close`."""
        with self._lock:
            if self._stop.is_set():
                raise LinkError("the in-process service is closed: make a new optimizer")
            if self._server is None:
                self._server = bind("memory://")
                self._thread = threading.Thread(
                    target=self._serve, args=(self._server,), name="distcurv-inline", daemon=True
                )
                self._thread.start()
            return connect(self._server.endpoint)

    def _serve(self, server: Server) -> None:
        settings = WorkerSettings(device=str(self._device))
        service = Service(settings, self._emit, os.getpid())
        run(server, service, stop=self._stop, emit=self._emit, name="inline")

    def close(self) -> None:
        """End the service; the refresh under way is finished first, at most 5 s are waited."""
        self._stop.set()
        with self._lock:  # a link may just be starting the thread
            server, thread = self._server, self._thread
        if server is not None and thread is not None:
            server.wake()
            thread.join(5.0)


def owner_links(workers: Workers, group: RankGroup, load: Load) -> OwnerLinks:
    """The connector that `distcurv` registers; called on all ranks together.

    Raises `ConfigError` for a ``workers`` of an unknown form, `EndpointError` for malformed
    endpoints and `MismatchError` when the ranks ask for different forms."""
    inline = InlineService(group.device, from_environment(f"rank{group.rank}"))
    endpoints, end_spawned = _endpoints(workers, group, load)

    def remote(endpoint: str) -> Callable[[], Link]:
        return lambda: connect(endpoint)

    def close() -> None:
        inline.close()
        end_spawned()

    return OwnerLinks(
        inline.connect, tuple((endpoint, remote(endpoint)) for endpoint in endpoints), close
    )


def _endpoints(
    workers: Workers, group: RankGroup, load: Load
) -> tuple[list[str], Callable[[], None]]:
    given = _given(workers)
    # Deciding takes collectives, which a rank that is told its endpoints would not join.
    group.agree(
        "whether workers are used",
        2 if given is None else min(1, len(given)),
        "0 stands for none, 1 for endpoints, 2 for 'auto' without any; give all ranks endpoints "
        f"or none, in workers= or in {ENDPOINTS_VARIABLE}",
    )
    if given is not None:
        return given, lambda: None
    nodes = group.nodes()
    cores = [from_vector(vector) for vector in group.gather(to_vector(own_cores()))]
    choice = choose(load, spare_cores(nodes, cores))
    spawns = choice.place == WORKER
    if group.rank == 0:
        what = "a worker on each node" if spawns else "refreshing in process"
        log.info('workers="auto" means %s: %s', what, choice.reason)
    return _spawn_one_per_node(group, nodes) if spawns else ([], lambda: None)


def _given(workers: Workers) -> list[str] | None:
    """The endpoints that are given, none for ``"inline"``; None where it is to be decided."""
    if workers in (0, "inline"):
        return []
    if workers == "auto":
        told = [e.strip() for e in os.environ.get(ENDPOINTS_VARIABLE, "").split(",")]
        return _checked([e for e in told if e]) or None
    if isinstance(workers, Sequence) and not isinstance(workers, str) and workers:
        return _checked(workers)
    raise ConfigError(
        f"workers is {workers!r}: use 0 or 'inline', 'auto', or a list of endpoints such as "
        "['tcp://127.0.0.1:5555']"
    )


def _checked(endpoints: Sequence[str]) -> list[str]:
    for endpoint in endpoints:
        if not isinstance(endpoint, str):
            raise ConfigError(f"workers contains {endpoint!r}: endpoints are strings")
        parse_connectable(endpoint)
    doubled = sorted({endpoint for endpoint in endpoints if endpoints.count(endpoint) > 1})
    if doubled:
        raise ConfigError(
            f"workers names {', '.join(doubled)} more than once: a worker has one session per "
            "owner, name each worker once"
        )
    return list(endpoints)


def _spawn_one_per_node(
    group: RankGroup, nodes: Sequence[int]
) -> tuple[list[str], Callable[[], None]]:
    """The first rank of each node starts a worker and tells its endpoint to the node's ranks."""
    from distcurv.launcher.supervisor import Supervisor

    first = nodes.index(nodes[group.rank])
    note = torch.zeros(_ENDPOINT_BYTES, dtype=torch.uint8)
    end: Callable[[], None] = lambda: None  # noqa: E731
    failure: DistcurvError | None = None
    if first == group.rank:
        supervisor = Supervisor(workers=1)
        try:
            supervisor.__enter__()
        except DistcurvError as error:
            failure = error  # raised below: the other ranks wait in the collective
        else:
            end = supervisor.close
            text = ",".join(supervisor.endpoints).encode()
            note[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    told = group.gather(note)[first]
    if failure is not None:
        raise failure
    text = bytes(told.tolist()).rstrip(b"\0")
    if not text:
        raise StateError(f"rank {first} could not start this node's worker: see its error")
    return text.decode().split(","), end
