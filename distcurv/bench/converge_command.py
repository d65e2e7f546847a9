"""``distcurv bench converge``: loss against steps and against seconds, method beside method."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distcurv.bench.arguments import at_least, device, words
from distcurv.errors import ConfigError

if TYPE_CHECKING:
    from distcurv.bench.converge_study import Study

_TASKS = ("digits", "charlm", "charlm-small", "autoencoder-big")
_METHODS = (
    "sgd", "adamw", "muon", "soap", "shampoo", "asdl-kfac", "lowrank-soap", "kfac"
)  # fmt: skip
_HARDWARE = ("one-core", "equal")  # the first is always timed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``distcurv bench converge``."""
    add = parser.add_argument
    add(
        "--tasks",
        type=words(_TASKS),
        default=("digits", "charlm"),
        metavar="LIST",
        help=f"some of {', '.join(_TASKS)} (default digits,charlm)",
    )
    add(
        "--methods",
        type=words(_METHODS),
        default=_METHODS,
        metavar="LIST",
        help=f"some of {', '.join(_METHODS)} (default all)",
    )
    add(
        "--grid-points",
        type=at_least(1),
        default=7,
        metavar="N",
        help="learning rates that every method tries on seed 0, a factor of 1.5 apart at the end "
        "(default 7)",
    )
    add(
        "--seeds",
        type=at_least(1),
        default=3,
        metavar="N",
        help="trainings at the best of them (default 3)",
    )
    add("--steps", type=at_least(1), metavar="N", help="of a training (default: the task's)")
    add(
        "--stretch",
        type=at_least(1),
        metavar="N",
        help="methods that have not reached the target loss get N times the steps for it "
        "(default: the task's, 2 for autoencoder-big and else 1)",
    )
    add(
        "--target-of",
        default="muon",
        metavar="METHOD",
        help="its mean loss at the end is the target of the seconds (default muon)",
    )
    add(
        "--hardware",
        type=words(_HARDWARE),
        default=_HARDWARE,
        metavar="LIST",
        help="one-core: one for everybody, and the worker's beside it; equal: peers get the "
        "worker's core too, as a second thread or rank, whichever is faster (default both)",
    )
    add(
        "--repetitions",
        type=at_least(1),
        default=3,
        metavar="N",
        help="short timed runs of every method and hardware (default 3)",
    )
    add(
        "--time",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure times as well; needs a quiet machine (default yes)",
    )
    add(
        "--jobs",
        type=at_least(1),
        default=1,
        metavar="N",
        help="cores' worth of trainings that run side by side while losses are found; a training "
        "with a worker takes two (default 1)",
    )
    add(
        "--deterministic-delay",
        type=at_least(0),
        metavar="K",
        help="distcurv's methods without worker, every version installed K steps after what it is "
        "based on (default: a worker process, real asynchrony)",
    )
    add("--device", default="cpu", help="cpu (default) or cuda, where --hardware is one-core")


def run(args: argparse.Namespace) -> int:
    """Train, time, print, write; what an interrupted run has finished is not done again."""
    from distcurv.bench.converge_picture import draw
    from distcurv.bench.converge_pool import Pool
    from distcurv.bench.converge_request import Cache
    from distcurv.bench.converge_rows import rows_of
    from distcurv.bench.converge_show import show
    from distcurv.bench.output import Record
    from distcurv.bench.show import Bar, show_files

    _check(args)
    studies = [_study(task, args) for task in args.tasks]
    settings = {key: value for key, value in vars(args).items() if key not in ("benchmark", "out")}
    record = Record(args, settings, args.device)
    cache = Cache(record.file.parent / "trainings")
    trainings = len(args.tasks) * len(args.methods) * (args.grid_points + args.seeds + 1)
    with Bar("losses", trainings) as bar:

        def done(request: Any) -> None:
            bar.at(f"{request.task} {request.method} lr {request.lr:g} seed {request.seed}")
            bar.advance()

        pool = Pool(cache, args.jobs, done)
        known = pool.complete(
            lambda known: [r for study in studies for r in study.losses_wanted(known)]
        )
    if args.time:
        timings = [r for study in studies for r in study.times_wanted(known)]
        with Bar("times", len(timings)) as bar:
            known |= Pool(cache, 1, done).complete(lambda known: timings)
    heads = [_head(study, known) for study in studies]
    rows = [row for study in studies for row in rows_of(study, known)]
    record.write(rows, tasks=heads)
    draw(record.picture, heads, rows)
    for head in heads:
        show(head, [row for row in rows if row["task"] == head["task"]])
    show_files(record.file, record.picture)
    return 0


def _check(args: argparse.Namespace) -> None:
    from distcurv.bench.converge_peers import PEERS
    from distcurv.bench.converge_tasks import require_data
    from distcurv.bench.step_peers import require_package
    from distcurv.config import MAX_DELAY_WINDOWS, SoapConfig

    device(args.device)
    if args.device == "cuda" and args.time and "equal" in args.hardware:
        raise ConfigError(
            "--hardware has equal, which gives peers a second core: with --device cuda give "
            "--hardware one-core"
        )
    if args.target_of not in args.methods:
        raise ConfigError(
            f"--target-of is {args.target_of!r}: choose one of --methods, which are "
            f"{', '.join(args.methods)}"
        )
    for name in args.methods:
        if name in PEERS:
            require_package(name)
    longest = MAX_DELAY_WINDOWS * SoapConfig().resolved_preconditioner_upd_interval
    if args.deterministic_delay is not None and args.deterministic_delay > longest:
        raise ConfigError(
            f"--deterministic-delay is {args.deterministic_delay}: give at most {longest}"
        )
    require_data(args.tasks)


def _study(task_name: str, args: argparse.Namespace) -> Study:
    from distcurv.bench.converge_study import Study
    from distcurv.bench.converge_tasks import TASKS

    task = TASKS[task_name]
    return Study(
        task=task_name,
        methods=args.methods,
        points=args.grid_points,
        seeds=args.seeds,
        steps=args.steps or task.steps,
        stretch=args.stretch or task.stretch,
        target_of=args.target_of,
        install_delay=args.deterministic_delay,
        equal="equal" in args.hardware,
        repetitions=args.repetitions,
        device=args.device,
    )


def _head(study: Study, known: Mapping[Any, dict[str, Any]]) -> dict[str, Any]:
    from distcurv.bench.converge_tasks import TASKS

    return {
        "task": study.task,
        "unit": TASKS[study.task].unit,
        "steps": study.steps,
        "points": study.points,
        "seeds": study.seeds,
        "target_of": study.target_of,
        "target": study.target(known),
    }
