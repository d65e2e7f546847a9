"""The command ``distcurv demo``: its arguments, and what must be there before it can start."""

from __future__ import annotations

import argparse
import importlib.util

from distcurv.demo.settings import DemoSettings, output_directory
from distcurv.errors import ConfigError

_NEEDED = {"rich": "rich", "matplotlib": "matplotlib"}
_NEEDED_BY_TASK = {"autoencoder": {"sklearn": "scikit-learn"}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``distcurv demo``; values are checked by `DemoSettings`."""
    default = DemoSettings()
    add = parser.add_argument
    add("--task", default=default.task, help="autoencoder (default) or charlm")
    add(
        "--nproc-per-node",
        type=int,
        default=default.ranks,
        metavar="N",
        help=f"training ranks (default {default.ranks})",
    )
    add(
        "--workers",
        type=int,
        default=default.workers,
        metavar="N",
        help=f"curvature workers; 0 refreshes inside the ranks (default {default.workers})",
    )
    add("--steps", type=int, metavar="N", help="steps of each training (default: the task's)")
    add(
        "--rank",
        type=int,
        default=default.rank,
        metavar="R",
        help=f"the low rank r of every side (default {default.rank})",
    )
    add(
        "--install-delay",
        type=int,
        metavar="K",
        help="install exactly K steps after what a version is based on (default: when it comes)",
    )
    add(
        "--seed",
        type=int,
        default=default.seed,
        metavar="S",
        help="of weights, data order and first bases (default 0)",
    )
    add("--out", default="runs/demo", metavar="DIR", help="results go here (default runs/demo)")
    add("--json", action="store_true", help="print summary.json, and nothing else, on stdout")


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit code.

    Raises:
        ConfigError: an option has a value that cannot work, or a package is missing.
    """
    settings = DemoSettings(
        task=args.task,
        steps=args.steps,
        ranks=args.nproc_per_node,
        workers=args.workers,
        rank=args.rank,
        install_delay=args.install_delay,
        seed=args.seed,
    )
    needed = {**_NEEDED, **_NEEDED_BY_TASK.get(settings.task, {})}
    missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f"the demo needs {', '.join(missing)}: pip install 'distcurv[demo]'")
    out = output_directory(args.out)

    # Only now: the driver needs the packages that were just looked for.
    from distcurv.demo.driver import run_demo

    return run_demo(settings, out, summary_on_stdout=args.json)
