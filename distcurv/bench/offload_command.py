"""``distcurv bench offload``: where a worker begins to pay, over blocks, width, rank and kind."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from distcurv.bench.arguments import at_least, device, numbers, words

if TYPE_CHECKING:
    from distcurv.bench.clock import Cores
    from distcurv.bench.offload_points import Point
    from distcurv.bench.show import Bar

_KINDS = ("lowrank", "dense")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``distcurv bench offload``."""
    add = parser.add_argument
    add(
        "--kinds",
        type=words(_KINDS),
        default=_KINDS,
        metavar="LIST",
        help=f"some of {', '.join(_KINDS)} (default both)",
    )
    for option, low, default, what in (
        ("--blocks", 1, (1, 8, 32, 128, 256), "linear layers of the model"),
        ("--widths", 2, (64, 256, 1024, 4096), "inputs and outputs of a layer"),
        ("--ranks", 1, (16, 64, 256), "low ranks r"),
    ):
        listed = ",".join(map(str, default))
        add(
            option,
            type=numbers(low),
            default=default,
            metavar="LIST",
            help=f"{what} (default {listed})",
        )
    for option, low, number, what in (
        ("--rows", 1, 64, "rows of a batch"),
        ("--interval", 4, 10, "steps between two refreshes"),
        ("--repetitions", 1, 7, "turns of every arm, each one interval; fewer where time is short"),
        ("--seconds", 1, 60, "time for one point; a point that needs more is left out"),
    ):
        add(
            option,
            type=at_least(low),
            default=number,
            metavar="N",
            help=f"{what} (default {number})",
        )
    add(
        "--gib",
        type=at_least(1),
        metavar="N",
        help="memory for one point; a point that needs more is left out (default: two thirds of "
        "what is free)",
    )
    add(
        "--sharded",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also train on two ranks that share the refreshes, where there are two cores; on the "
        "CPU alone (default yes)",
    )
    add("--device", default="cpu", help="cpu (default) or cuda, for training and worker alike")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; 1 when no point at all could be measured."""
    from distcurv.bench.clock import choose_cores, one_thread
    from distcurv.bench.offload_picture import draw, show
    from distcurv.bench.offload_points import available_bytes, grid, matmul_rate, plan_point
    from distcurv.bench.offload_rows import fit
    from distcurv.bench.output import Record
    from distcurv.bench.show import Bar, show_files

    device(args.device)
    cores = choose_cores()
    pair = args.sharded and cores.training != cores.worker and args.device == "cpu"
    points = grid(args.kinds, args.blocks, args.widths, args.ranks, args.rows, args.interval)
    memory = float(args.gib * 2**30) if args.gib is not None else available_bytes(args.device) / 1.5
    with one_thread():
        rate = matmul_rate(args.device)
    settings = {
        "kinds": args.kinds,
        "blocks": args.blocks,
        "widths": args.widths,
        "ranks": args.ranks,
        "rows": args.rows,
        "interval": args.interval,
        "seconds_per_point": args.seconds,
        "memory_gib": round(memory / 2**30, 1),
        "matmul_gflops": round(rate / 1e9, 1),
        "sharded": pair,
        "core_of_training": cores.training,
        "core_of_worker": cores.worker,
    }
    record = Record(args, settings, args.device)
    left_out: list[dict[str, Any]] = []
    planned: list[tuple[Point, int]] = []
    for point in points:
        repetitions, why = plan_point(
            point, repetitions=args.repetitions, seconds=args.seconds, memory=memory, rate=rate
        )
        if why is None:
            planned.append((point, repetitions))
        else:
            left_out.append({**point.fields(), "reason": why})
    rows: list[dict[str, Any]] = []

    def write() -> dict[str, Any]:
        return record.write(rows, left_out=left_out, calibration=fit(rows))

    content = write()
    with Bar("offload", len(planned)) as bar:
        for row, failure in _measure(planned, cores, pair, args.device, bar):
            if row is not None:
                rows.append(row)
            if failure is not None:
                left_out.append(failure)
            content = write()  # a run of an hour may be interrupted
    draw(record.picture, content)
    show(content)
    show_files(record.file, record.picture)
    return 0 if rows else 1


def _measure(
    planned: list[tuple[Point, int]], cores: Cores, pair: bool, device: str, bar: Bar
) -> Iterator[tuple[dict[str, Any] | None, dict[str, Any] | None]]:
    """For each point its row, or why it failed; after a failure the others go on with new
    processes."""
    from distcurv.bench.offload_crew import Crew, make_crew
    from distcurv.bench.offload_rows import measure_point, row_of
    from distcurv.errors import StateError

    crew: Crew | None = None
    with ExitStack() as processes:
        for point, repetitions in planned:
            bar.at(str(point))
            if crew is None:
                crew = processes.enter_context(make_crew(cores, pair=pair, device=device))
            try:
                row = row_of(point, measure_point(crew, point, repetitions))
            except StateError as error:
                processes.close()
                crew = None
                yield None, {**point.fields(), "reason": f"failed: {error}"}
            else:
                yield row, None
            bar.advance()
