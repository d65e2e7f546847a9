"""The command ``distcurv demo``: its arguments, and what must be there before it can start.

With ``--makers`` it compares gradient makers, else distcurv with AdamW; some options have other
defaults then, so they have none here.
"""

from __future__ import annotations

import argparse
import importlib.util
from typing import TYPE_CHECKING

from distcurv.demo.settings import DemoSettings, output_directory
from distcurv.errors import ConfigError

if TYPE_CHECKING:
    from distcurv.demo.makers_settings import MakersSettings

_NEEDED = {"rich": "rich", "matplotlib": "matplotlib"}
_NEEDED_BY_TASK = {"autoencoder": {"sklearn": "scikit-learn"}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``distcurv demo``; values are checked by `DemoSettings`."""
    default = DemoSettings()
    add = parser.add_argument
    add("--task", default=default.task, help="autoencoder (default) or charlm")
    add(
        "--makers",
        metavar="NAMES",
        help="compare gradient makers, in one process: e.g. kfac,ekfac,shampoo,soap",
    )
    add(
        "--nproc-per-node",
        type=int,
        metavar="N",
        help=f"training ranks (default {default.ranks})",
    )
    add(
        "--workers",
        type=int,
        metavar="N",
        help=f"curvature workers; 0 refreshes inside the ranks (default {default.workers}, "
        "with --makers 0)",
    )
    add("--steps", type=int, metavar="N", help="steps of each training (default: the task's)")
    add(
        "--rank",
        type=int,
        metavar="R",
        help=f"the low rank r of every side (default {default.rank}, with --makers 16)",
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
    settings = _makers_settings(args) if args.makers is not None else _demo_settings(args)
    needed = {**_NEEDED, **_NEEDED_BY_TASK.get(settings.task, {})}
    missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f"the demo needs {', '.join(missing)}: pip install 'distcurv[demo]'")
    out = output_directory(args.out)

    # Only now: the drivers need the packages that were just looked for.
    if isinstance(settings, DemoSettings):
        from distcurv.demo.driver import run_demo

        return run_demo(settings, out, summary_on_stdout=args.json)
    from distcurv.demo.makers_run import run_makers

    return run_makers(settings, out, summary_on_stdout=args.json)


def _demo_settings(args: argparse.Namespace) -> DemoSettings:
    given = {
        "ranks": args.nproc_per_node,
        "workers": args.workers,
        "rank": args.rank,
    }
    return DemoSettings(
        task=args.task,
        steps=args.steps,
        install_delay=args.install_delay,
        seed=args.seed,
        **{name: value for name, value in given.items() if value is not None},
    )


def _makers_settings(args: argparse.Namespace) -> MakersSettings:
    from distcurv.demo.makers_registry import parse_names
    from distcurv.demo.makers_settings import MakersSettings

    if args.nproc_per_node not in (None, 1):
        raise ConfigError(
            f"--nproc-per-node is {args.nproc_per_node}: with --makers there is one training "
            "process, leave it out"
        )
    if args.install_delay is not None:
        raise ConfigError(
            f"--install-delay is {args.install_delay}: it does not go with --makers, leave one out"
        )
    given = {"workers": args.workers, "rank": args.rank}
    return MakersSettings(
        names=parse_names(args.makers),
        task=args.task,
        steps=args.steps,
        seed=args.seed,
        **{name: value for name, value in given.items() if value is not None},
    )
