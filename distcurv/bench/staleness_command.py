"""``distcurv bench staleness``: final loss against the age of what is installed.

In process and in the deterministic mode: a version based on step t is installed exactly at t + k,
so two delays differ in nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distcurv.bench.arguments import at_least, device, numbers, words
from distcurv.errors import ConfigError

if TYPE_CHECKING:
    from distcurv.bench.staleness_study import StalenessStudy

_TASKS = ("digits", "charlm", "charlm-small", "autoencoder-big")
_ARMS = ("with", "without")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``distcurv bench staleness``."""
    add = parser.add_argument
    add(
        "--tasks",
        type=words(_TASKS),
        default=("digits",),
        metavar="LIST",
        help=f"some of {', '.join(_TASKS)}, the tasks of bench converge (default digits)",
    )
    add(
        "--delays",
        type=numbers(0),
        default=(0, 1, 5, 20, 100),
        metavar="LIST",
        help="values of install_delay in steps; learning rates are tuned at the first (default "
        "0,1,5,20,100)",
    )
    add(
        "--batches",
        type=numbers(1),
        default=(64, 256, 1024),
        metavar="LIST",
        help="batch sizes: images, or tokens in windows of 64 (default 64,256,1024)",
    )
    add(
        "--correction",
        type=words(_ARMS),
        default=_ARMS,
        metavar="LIST",
        help="with: LowRankSOAP; without: low-rank K-FAC over SGD with momentum (default both)",
    )
    add(
        "--grid-points",
        type=at_least(1),
        default=7,
        metavar="N",
        help="learning rates that are tried for each batch size and method (default 7)",
    )
    add("--seeds", type=at_least(1), default=3, metavar="N", help="trainings each (default 3)")
    add("--steps", type=at_least(1), metavar="N", help="of each training (default: the task's)")
    add(
        "--interval",
        type=at_least(1),
        default=10,
        metavar="T",
        help="steps between two installs; a delay may be 12 times as long (default 10)",
    )
    add(
        "--jobs",
        type=at_least(1),
        default=1,
        metavar="N",
        help="trainings that run side by side (default 1)",
    )
    add("--device", default="cpu", help="cpu (default) or cuda")


def run(args: argparse.Namespace) -> int:
    """Train, print, write; what an interrupted run has finished is not done again."""
    from distcurv.bench.converge_pool import Pool
    from distcurv.bench.converge_request import Cache, Request
    from distcurv.bench.output import Record
    from distcurv.bench.show import Bar, show_files
    from distcurv.bench.staleness_picture import draw

    _check(args)
    studies = [_study(task, args) for task in args.tasks]
    settings = {key: value for key, value in vars(args).items() if key not in ("benchmark", "out")}
    record = Record(args, settings, args.device)
    cache = Cache(record.file.parent / "trainings")
    with Bar("staleness", sum(study.trainings() for study in studies)) as bar:

        def done(request: Request) -> None:
            bar.at(
                f"{request.task} {request.method} batch {request.rows} delay "
                f"{request.install_delay} lr {request.lr:g} seed {request.seed}"
            )
            bar.advance()

        known = Pool(cache, args.jobs, done).complete(
            lambda known: [request for study in studies for request in study.wanted(known)]
        )
    rows = [row for study in studies for row in study.rows(known)]
    content = record.write(rows)
    draw(record.picture, args.tasks, args.batches, content)
    _show(rows, args.delays)
    show_files(record.file, record.picture)
    return 0


def _check(args: argparse.Namespace) -> None:
    from distcurv.bench.converge_tasks import TASKS, require_data
    from distcurv.config import MAX_DELAY_WINDOWS

    device(args.device)
    require_data(args.tasks)
    for name in args.tasks:
        for batch in args.batches:
            if batch % TASKS[name].rows_per_sample:
                raise ConfigError(
                    f"--batches has {batch}: {name} has {TASKS[name].rows_per_sample} tokens to a "
                    "window, give multiples of it"
                )
            if TASKS[name].rows_per_sample == 1 and batch > 1797:
                raise ConfigError(
                    f"--batches has {batch}: {name} has 1797 images, give at most so many"
                )
    longest = MAX_DELAY_WINDOWS * args.interval
    if max(args.delays) > longest:
        raise ConfigError(
            f"--delays has {max(args.delays)}, and with --interval {args.interval} a delay may be "
            f"at most {longest}: leave it out, or give a longer interval"
        )


def _study(task: str, args: argparse.Namespace) -> StalenessStudy:
    from distcurv.bench.converge_tasks import TASKS
    from distcurv.bench.staleness_study import StalenessStudy

    return StalenessStudy(
        task=task,
        batches=args.batches,
        arms=args.correction,
        delays=args.delays,
        points=args.grid_points,
        seeds=args.seeds,
        steps=args.steps or TASKS[task].steps,
        interval=args.interval,
        device=args.device,
    )


def _show(rows: Sequence[Mapping[str, Any]], delays: Sequence[int]) -> None:
    from distcurv.bench.show import show_table

    lines: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = (row["task"], row["batch"], row["eigenvalue_correction"])
        lines.setdefault(key, []).append(row)
    show_table(
        f"final loss, mean of the seeds, and what is lost over delay {delays[0]}",
        ("task", "batch", "eigenvalue correction", "lr", *(f"delay {delay}" for delay in delays)),
        [
            [
                task,
                str(batch),
                arm,
                f"{own[0]['lr']:g}" + ("" if own[0]["best_is_inside"] else " (edge)"),
                *(_cell(row) for row in own),
            ]
            for (task, batch, arm), own in lines.items()
        ],
    )


def _cell(row: Mapping[str, Any]) -> str:
    if row["mean"] is None:
        return f"{row['diverged']} diverged"
    over = row["over_first_delay"]
    return f"{row['mean']:.4g}" + ("" if over is None else f" ({over:+.1%})")
