"""``distcurv bench step``: what a training step costs, method beside method."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from distcurv.bench.step_options import add_arguments, methods_of

if TYPE_CHECKING:
    from distcurv.bench.step_crew import Variant

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    methods = methods_of(args)
    from distcurv.bench.clock import choose_cores, one_thread, pinned
    from distcurv.bench.output import Record
    from distcurv.bench.show import Bar, show_files
    from distcurv.bench.step_crew import make_crew, variants
    from distcurv.bench.step_rows import BASELINE, row_of
    from distcurv.bench.step_run import attempt, take_turns, warm_up, warm_up_steps
    from distcurv.bench.step_show import draw, show

    chosen = variants(
        (BASELINE, *(name for name in methods if name != BASELINE)), args.rank, args.worker
    )
    cores = choose_cores()
    steps = args.steps or 2 * args.interval
    settings = {
        "model": args.model,
        "methods": list(dict.fromkeys(variant.method for variant in chosen)),
        "rank": args.rank,
        "interval": args.interval,
        "capture_interval": args.capture_interval,
        "worker": args.worker,
        "steps_of_a_turn": steps,
        "warm_up_steps": warm_up_steps(args.interval),
        "core_of_training": cores.training,
        "core_of_worker": cores.worker,
    }
    record = Record(args, settings, args.device)
    work = len(chosen) * (args.repetitions + 1 + int(args.memory))
    with one_thread(), pinned(cores.training), Bar(f"step, {args.model}", work) as bar:

        def at(what: str) -> None:
            bar.at(what)
            bar.advance()

        with make_crew(
            chosen,
            args.model,
            args.device,
            cores,
            interval=args.interval,
            capture_interval=args.capture_interval,
        ) as crew:
            for member in crew:
                at(f"{member.variant.method} warms up")
                attempt(member, partial(warm_up, member, args.interval))
            take_turns(crew, args.repetitions, steps, at)
            whole = [member for member in crew if member.fault is None]
            left_out = [
                {**member.variant._asdict(), "why": member.fault}
                for member in crew
                if member.fault is not None
            ]
            rows = [row_of(member, whole) for member in whole]
        _add_memory(rows, [member.variant for member in whole], args, at)
        content = record.write(rows, left_out=left_out)
    draw(record.picture, content)
    show(content)
    show_files(record.file, record.picture)
    return 0


def _add_memory(
    rows: list[dict[str, Any]],
    chosen: Sequence[Variant],
    args: argparse.Namespace,
    at: Callable[[str], None],
) -> None:
    """``memory`` of every row, None where it is not asked for; the first row is the baseline."""
    from distcurv.bench.step_memory import above, memory_of

    baseline: dict[str, Any] | None = None
    for row, variant in zip(rows, chosen, strict=True):
        row["memory"] = None
        if not args.memory:
            continue
        at(f"memory of {variant.method}")
        found = memory_of(
            {
                **variant._asdict(),
                "model": args.model,
                "device": args.device,
                "interval": args.interval,
                "capture_interval": args.capture_interval,
            }
        )
        baseline = baseline or found
        row["memory"] = above(found, baseline)
