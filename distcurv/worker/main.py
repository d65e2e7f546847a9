"""The worker as a process: signals, threads and the ready file, which an inline worker must not
touch, live here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch

from distcurv.wire import bind as bind_server
from distcurv.worker.compute import Computer
from distcurv.worker.loop import run
from distcurv.worker.service import Service
from distcurv.worker.settings import WorkerSettings

log = logging.getLogger("distcurv.worker")

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def serve(
    bind: str,
    *,
    emit: Callable[..., None],
    ready_file: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    threads: int = 1,
    name: str = "worker0",
    settings: WorkerSettings | None = None,
) -> int:
    """Serve one job after another on ``bind`` until SIGTERM or SIGINT; returns the exit code 0.

    Prints the endpoint with its real port on a line of its own and, once connections are taken,
    writes it to ``ready_file`` (atomically).  ``device`` and ``threads`` override ``settings``.
    Must be called from the main thread of a process of its own.  Raises `ConfigError` and
    `EndpointError` at once."""
    settings = dataclasses.replace(settings or WorkerSettings(), device=device, threads=threads)
    Computer(settings.device)  # refuses a device that is not there before anybody connects
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    previous = {number: signal.signal(number, on_signal) for number in SIGNALS}
    try:
        server = bind_server(bind)
        torch.set_num_threads(settings.threads)
        service = Service(settings, emit, os.getpid())
        print(server.endpoint, flush=True)
        if ready_file is not None:
            _write_ready(Path(ready_file), server.endpoint)
        log.info("%s listens on %s, device %s", name, server.endpoint, settings.device)
        run(server, service, stop=stop, emit=emit, name=name)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0


def _write_ready(path: Path, endpoint: str) -> None:
    """A reader finds the whole line or no file: written aside, then renamed."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(endpoint + "\n", encoding="utf-8")
    os.replace(partial, path)
