"""``distcurv run``: workers on this node, then the training script under torchrun beside them."""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from collections.abc import Sequence

from distcurv.errors import LaunchError
from distcurv.launcher import tree
from distcurv.launcher.arguments import count_from, devices, seconds
from distcurv.launcher.exit_code import of_signal
from distcurv.launcher.job import Job, run_torchrun
from distcurv.launcher.signals import SignalBox
from distcurv.launcher.supervisor import Supervisor
from distcurv.launcher.torchrun_options import Split, check, with_rendezvous
from distcurv.launcher.torchrun_options import split as split_words

ENDPOINTS_VARIABLE = "DISTCURV_ENDPOINTS"

_OWN_FLAGS = frozenset({"-h", "--help"})
_OWN_OPTIONS = frozenset({"--workers", "--worker-device", "--worker-threads", "--grace"})
_POLL_S = 0.05
_WORKER_END_S = 5.0
# After a signal the workers are told to end so long before the script is killed, and killed
# themselves so long after it: everything is to be gone soon after --grace.  A worker whose owners
# are gone waits a second for their answers.
_WORKER_HEAD_START_S = 1.0
_WORKER_END_AFTER_SIGNAL_S = 2.0


def split(argv: Sequence[str]) -> tuple[list[str], Split]:
    """(options of distcurv run, everything with its parts); `ConfigError` for a bad line."""
    parts = split_words(argv, _OWN_FLAGS, _OWN_OPTIONS)
    return parts.own, parts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``distcurv run`` itself; all others go to torchrun."""
    parser.usage = "distcurv run [options] [options of torchrun] script.py ARGS"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "Options of torchrun are passed through: --nproc-per-node, --nnodes, --rdzv-*, -m, ...\n"
        "With one node and no rendezvous named, --standalone is added.\n\n"
        "The exit code is the script's: that of the rank that failed first; 128 + N when signal N\n"
        f"ended it.  The script finds the workers in {ENDPOINTS_VARIABLE}."
    )
    parser.add_argument(
        "--workers",
        type=count_from(0),
        default=1,
        metavar="N",
        help=f"curvature workers to start on this node (default 1); 0 starts none and leaves "
        f"{ENDPOINTS_VARIABLE} as it is",
    )
    parser.add_argument(
        "--worker-device",
        type=devices,
        default=["cpu"],
        metavar="D[,D...]",
        help="device of the workers, e.g. cpu or cuda:1; several are given out in turn",
    )
    parser.add_argument(
        "--worker-threads", type=count_from(1), metavar="N", help="CPU threads of each worker"
    )
    parser.add_argument(
        "--grace",
        type=seconds,
        default=2.5,
        metavar="SECONDS",
        help="after Ctrl-C, SIGTERM or SIGHUP: how long the script may take to end before it is "
        "killed (default 2.5); a second signal kills at once",
    )


def run(args: argparse.Namespace) -> int:
    """Run the job to its end and return its exit code; no process is left behind."""
    parts: Split = args.passed_on
    check(parts)
    argv = [*with_rendezvous(parts, os.environ), *parts.program]
    tree.adopt_orphans()
    with SignalBox() as signals:
        supervisor = Supervisor(
            args.workers,
            devices=args.worker_device,
            threads=args.worker_threads,
            end_timeout=_WORKER_END_S,
            cancelled=lambda: bool(signals.received),
        )
        try:
            with supervisor:
                env = {ENDPOINTS_VARIABLE: ",".join(supervisor.endpoints)} if args.workers else {}
                with run_torchrun(argv, env=env) as job:
                    code = _await(job, signals, args.grace, supervisor)
                if signals.received:
                    supervisor.end_timeout = _WORKER_END_AFTER_SIGNAL_S
        except LaunchError:
            if not signals.received:
                raise
        finally:
            # What the script left behind, or lost when torchrun itself was killed.
            tree.end_descendants(os.getpid(), grace=0.0)
        return of_signal(signals.received[0]) if signals.received else code


def _await(job: Job, signals: SignalBox, grace: float, supervisor: Supervisor) -> int:
    """Wait for the job's end; pass the first signal on to it, kill it when it takes too long."""
    deadline: float | None = None
    while True:
        try:
            return job.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            pass
        if not signals.received:
            continue
        now = time.monotonic()
        if deadline is None:
            job.send_signal(signals.received[0])
            deadline = now + grace
        if now > deadline - _WORKER_HEAD_START_S:
            supervisor.stop()
        if now > deadline or len(signals.received) > 1:
            return job.kill()
