"""``distcurv worker``: one curvature worker in this process, until SIGTERM."""

from __future__ import annotations

import argparse
import logging
import os
import sys

from distcurv.errors import ConfigError
from distcurv.launcher import lifeline
from distcurv.launcher.arguments import count_from, device

_LAUNCHER_LOST = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``distcurv worker``."""
    parser.add_argument(
        "--bind",
        default="tcp://127.0.0.1:0",
        metavar="ENDPOINT",
        help="where to listen: tcp://127.0.0.1:PORT (0: a free port) or ipc://PATH",
    )
    parser.add_argument(
        "--ready-file",
        metavar="FILE",
        help="is written with the endpoint once the worker takes connections",
    )
    parser.add_argument("--device", type=device, default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--threads", type=count_from(1), default=1, metavar="N", help="CPU threads (default 1)"
    )
    parser.add_argument("--name", default="worker0", help="name in events and log lines")
    parser.add_argument("--lifeline-fd", type=count_from(0), help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Serve until told to end; returns 0 after an orderly end."""
    if args.lifeline_fd is not None:
        # Before torch is imported, which takes seconds in which the launcher may die.
        lifeline.die_with_parent()
        lifeline.hold(args.lifeline_fd, lambda: os._exit(_LAUNCHER_LOST))
    if args.ready_file is not None:
        folder = os.path.dirname(args.ready_file) or "."
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(
                f"--ready-file {args.ready_file}: {folder} is no directory that can be written"
            )
    from distcurv.observe.events import from_environment
    from distcurv.worker.main import serve

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    emit = from_environment(args.name)
    try:
        code = serve(
            args.bind,
            ready_file=args.ready_file,
            device=args.device,
            threads=args.threads,
            name=args.name,
            emit=emit,
        )
    finally:
        emit.close()
    if args.lifeline_fd is not None:
        # Unloading torch takes a second and more, and the launcher waits for this process.
        sys.stdout.flush()
        os._exit(code)
    return code
