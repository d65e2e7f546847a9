"""Links and workers that misbehave on purpose, and the connectors that hand them to a run."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from distcurv import wiring
from distcurv.errors import ProtocolError
from distcurv.train.group import RankGroup
from distcurv.train.lanes import OwnerLinks
from distcurv.train.placement import Load
from distcurv.train.provider import Workers, register_connector
from distcurv.wire import Link, bind
from distcurv.wire.messages import Message
from distcurv.worker.compute import Computer
from distcurv.worker.service import Service
from distcurv.worker.settings import WorkerSettings

Connect = Callable[[], Link]


class WrappedLink:
    """A link through another; what is not overridden passes."""

    def __init__(self, inner: Link) -> None:
        self.inner = inner
        self.endpoint = inner.endpoint

    def send(self, message: Message) -> bool:
        return self.inner.send(message)

    def receive(self, timeout: float) -> Message | None:
        return self.inner.receive(timeout)

    def wake(self) -> None:
        self.inner.wake()

    def close(self) -> None:
        self.inner.close()


class DelayedLink(WrappedLink):
    """Each message waits a random time, from the seed, on its way in and out."""

    def __init__(self, inner: Link, seed: int, longest: float) -> None:
        super().__init__(inner)
        self._random = random.Random(seed)
        self._longest = longest

    def send(self, message: Message) -> bool:
        time.sleep(self._random.uniform(0, self._longest))
        return self.inner.send(message)

    def receive(self, timeout: float) -> Message | None:
        message = self.inner.receive(timeout)
        if message is not None:
            time.sleep(self._random.uniform(0, self._longest))
        return message


class HangingLink(WrappedLink):
    """Never returns from ``send`` or ``receive``, once ``after`` calls of it have been made."""

    def __init__(self, inner: Link, where: str, after: int = 0) -> None:
        super().__init__(inner)
        self._where = where
        self._after = after
        self.hangs = threading.Event()

    def _maybe(self, where: str) -> None:
        if where == self._where:
            self._after -= 1
            if self._after < 0:
                self.hangs.set()
                threading.Event().wait()

    def send(self, message: Message) -> bool:
        self._maybe("send")
        return self.inner.send(message)

    def receive(self, timeout: float) -> Message | None:
        self._maybe("receive")
        return self.inner.receive(timeout)


@contextmanager
def wrapped_links(wrap: Callable[[Link, int], Link]) -> Iterator[None]:
    """Runs made in the body have ``wrap(link, rank)`` in place of each link to a worker."""

    def connector(workers: Workers, group: RankGroup, load: Load) -> OwnerLinks:
        links = wiring.owner_links(workers, group, load)

        def wrapping(inner: Connect) -> Connect:
            return lambda: wrap(inner(), group.rank)

        remotes = tuple((endpoint, wrapping(inner)) for endpoint, inner in links.remotes)
        return OwnerLinks(links.inline, remotes, links.close)

    register_connector(connector)
    try:
        yield
    finally:
        register_connector(wiring.owner_links)


class MouthWorker:
    """A true service behind a mouth that may lie: a thread that serves ``endpoint``.

    Args:
        say: what becomes of each message to an owner (any number of messages).
        deaf: takes nothing any more once it has welcomed an owner.
    """

    def __init__(
        self,
        say: Callable[[Message], Sequence[Message]] = lambda message: [message],
        *,
        deaf: bool = False,
        endpoint: str = "tcp://127.0.0.1:0",
    ) -> None:
        self.say = say
        self.heard: list[Message] = []
        self._deaf = deaf
        self._server = bind(endpoint)
        self.endpoint = self._server.endpoint
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="mouth-worker", daemon=True)

    def __enter__(self) -> MouthWorker:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._server.wake()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        service = Service(WorkerSettings(heartbeat=0.1), lambda *args, **fields: None, os.getpid())
        computer = Computer("cpu")
        welcomed = False
        try:
            while not self._stop.is_set():
                if self._deaf and welcomed:
                    self._stop.wait(0.05)
                    continue
                incoming = self._server.receive(0.02)
                now = time.monotonic()
                out = []
                if incoming is not None:
                    if not isinstance(incoming.content, ProtocolError):
                        self.heard.append(incoming.content)
                    out += service.on_message(incoming.peer, incoming.content, now)
                    welcomed = bool(out)
                job = service.next_job(now)
                if job is not None:
                    out += service.on_result(job, computer.run(job), now)
                out += service.on_tick(now)
                for peer, message in out:
                    for said in self.say(message):
                        self._server.send(peer, said)
        finally:
            self._server.close()


class CuttingProxy:
    """Carries bytes between an owner and a worker, and breaks the connection in the middle.

    The first connection is cut once ``cut_after`` bytes came from the worker; later ones are
    carried whole.  ``on_cut`` is called before the owner notices."""

    def __init__(self, target: str, cut_after: int, on_cut: Callable[[], None]) -> None:
        host, _, port = target.removeprefix("tcp://").rpartition(":")
        self._target = (host, int(port))
        self._left = cut_after
        self._on_cut = on_cut
        self.cut = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = [self._listener]
        self._threads: list[threading.Thread] = []
        self._closed = False

    def __enter__(self) -> CuttingProxy:
        self._spawn(self._accept)
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed = True
        for one in self._sockets:
            _shut(one)
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def _spawn(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                owner, _ = self._listener.accept()
            except OSError:
                return
            try:
                worker = socket.create_connection(self._target, timeout=60)
            except OSError:
                _shut(owner)
                continue
            worker.settimeout(None)
            self._sockets += [owner, worker]
            self._spawn(self._carry, owner, worker, False)
            self._spawn(self._carry, worker, owner, True)

    def _carry(self, source: socket.socket, sink: socket.socket, from_worker: bool) -> None:
        try:
            while data := source.recv(1024):
                if from_worker and not self.cut.is_set():
                    data = data[: self._left]
                    self._left -= len(data)
                sink.sendall(data)
                if from_worker and self._left <= 0 and not self.cut.is_set():
                    self.cut.set()
                    self._on_cut()
                    break
        except OSError:
            pass  # the other side ended, which ends this one
        _shut(source)
        _shut(sink)


def _shut(one: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it was not connected
        one.shutdown(socket.SHUT_RDWR)
    one.close()
