"""The command ``distcurv bench``: finds the benchmark and what it needs.

A benchmark is a module with ``add_arguments(parser)`` and ``run(args) -> int``, and one line in
`BENCHMARKS`.  All of them are declared when the command is parsed, so they import torch and their
own heavy parts only in ``run``.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util

from distcurv.errors import ConfigError

BENCHMARKS: dict[str, tuple[str, str]] = {
    "step": (
        "distcurv.bench.step_command",
        "time of a training step: methods in turn, in one process, over plain SGD",
    ),
    "capture": (
        "distcurv.bench.capture_command",
        "forward and backward with the capture at rest and at work, over those without distcurv",
    ),
    "refresh": (
        "distcurv.bench.refresh_command",
        "the low-rank refresh against eigh and the Cholesky inverse, and its residual",
    ),
    "bytes": (
        "distcurv.bench.bytes_command",
        "bytes per refresh, sketches against dense factors (computed from the layouts)",
    ),
    "wire": (
        "distcurv.bench.wire_command",
        "statistics and preconditioners over each link: GB/s, latency, CPU time per byte",
    ),
    "offload": (
        "distcurv.bench.offload_command",
        "refreshes on a worker, in process, and shared by the ranks: where a worker pays",
    ),
    "converge": (
        "distcurv.bench.converge_command",
        "loss against steps and against seconds, every method with as many tried settings",
    ),
    "staleness": (
        "distcurv.bench.staleness_command",
        "final loss of LowRankSOAP against the age of what it installs",
    ),
}

_NEEDED = {"rich": "rich", "matplotlib": "matplotlib"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare every benchmark with its options."""
    choices = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, (module_name, purpose) in BENCHMARKS.items():
        own = choices.add_parser(name, help=purpose, description=purpose, allow_abbrev=False)
        importlib.import_module(module_name).add_arguments(own)
        own.add_argument(
            "--out",
            default=f"runs/bench-{name}",
            metavar="DIR",
            help=f"JSON and picture go here (default runs/bench-{name})",
        )


def run(args: argparse.Namespace) -> int:
    """Run the benchmark that was asked for; returns the exit code.

    Raises:
        ConfigError: an option has a value that cannot work, or a package is missing.
    """
    missing = [name for module, name in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"distcurv bench needs {', '.join(missing)}: pip install 'distcurv[bench]'"
        )
    module_name, _ = BENCHMARKS[args.benchmark]
    return int(importlib.import_module(module_name).run(args))
