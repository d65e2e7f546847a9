"""``distcurv bench step``: what a training step costs, method beside method."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distcurv.bench.arguments import at_least, device, words
from distcurv.errors import ConfigError

_MODELS = ("autoencoder", "charlm", "convnet")
_METHODS = (
    "sgd", "adamw", "muon", "lowrank-soap", "kfac", "kfac-dense", "soap", "shampoo", "asdl-kfac"
)  # fmt: skip
_WORKERS = ("process", "inline", "idle")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``distcurv bench step``."""
    add = parser.add_argument
    add("--model", default="autoencoder", help=f"{', '.join(_MODELS)} (default autoencoder)")
    add(
        "--methods",
        type=words(_METHODS),
        default=("sgd", "adamw", "lowrank-soap", "kfac"),
        metavar="LIST",
        help=f"some of {', '.join(_METHODS)} (default sgd,adamw,lowrank-soap,kfac); sgd is always "
        "among them",
    )
    add("--rank", type=at_least(1), default=32, metavar="R", help="the low rank r (default 32)")
    add(
        "--interval",
        type=at_least(4),
        default=10,
        metavar="T",
        help="steps between two refreshes, of every method that has them (default 10)",
    )
    add(
        "--capture-interval",
        type=at_least(1),
        default=2,
        metavar="N",
        help="steps between two statistics of distcurv's methods (default 2)",
    )
    add(
        "--repetitions",
        type=at_least(1),
        default=5,
        metavar="N",
        help="turns of every method (default 5)",
    )
    add(
        "--steps",
        type=at_least(1),
        metavar="N",
        help="steps of a turn, a multiple of the interval (default: twice the interval)",
    )
    add(
        "--worker",
        default="process",
        help="process (on another core, default), inline, or idle: as process, but stopped while "
        "steps are timed, so that its interference shows",
    )
    add(
        "--memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also measure each method's peak memory in a process of its own (default yes)",
    )
    add("--device", default="cpu", help="cpu (default) or cuda")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    from distcurv.bench.clock import choose_cores, one_thread, pinned
    from distcurv.bench.output import Record
    from distcurv.bench.show import Bar, show_files
    from distcurv.bench.step_crew import make_crew
    from distcurv.bench.step_run import BASELINE, row_of, run_steps, take_turns, warm_up_steps

    steps = _check(args)
    names = (BASELINE, *(name for name in args.methods if name != BASELINE))
    cores = choose_cores()
    settings = {
        "model": args.model,
        "methods": names,
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
    work = len(names) * (args.repetitions + 1 + int(args.memory))
    with one_thread(), pinned(cores.training), Bar(f"step, {args.model}", work) as bar:

        def at(what: str) -> None:
            bar.at(what)
            bar.advance()

        with make_crew(
            names,
            args.model,
            args.device,
            args.worker,
            cores,
            rank=args.rank,
            interval=args.interval,
            capture_interval=args.capture_interval,
        ) as crew:
            for member in crew:
                at(f"{member.name} warms up")
                run_steps(member, warm_up_steps(args.interval), timed=False)
                member.settle()
            take_turns(crew, args.repetitions, steps, at)
            rows = [row_of(member, crew[0]) for member in crew]
        _add_memory(rows, args, at)
        content = record.write(rows)
    draw(record.picture, content)
    _show(content)
    show_files(record.file, record.picture)
    return 0


def _check(args: argparse.Namespace) -> int:
    """Steps of a turn, once all options are found good."""
    from distcurv.bench.step_peers import PEERS, require_package

    if args.model not in _MODELS:
        raise ConfigError(f"--model is {args.model!r}: choose one of {', '.join(_MODELS)}")
    if args.worker not in _WORKERS:
        raise ConfigError(f"--worker is {args.worker!r}: choose one of {', '.join(_WORKERS)}")
    device(args.device)
    if args.capture_interval > args.interval:
        raise ConfigError(
            f"--capture-interval is {args.capture_interval}: give at most --interval "
            f"({args.interval})"
        )
    steps: int = args.steps or 2 * args.interval
    if steps % args.interval:
        raise ConfigError(
            f"--steps is {steps}: give a multiple of --interval ({args.interval}), so that every "
            "turn has its share of refreshes"
        )
    for name in args.methods:
        if name in PEERS:
            require_package(name)
    return steps


def _add_memory(
    rows: list[dict[str, Any]], args: argparse.Namespace, at: Callable[[str], None]
) -> None:
    from distcurv.bench.step_memory import peak_of

    for row in rows:
        row["peak_bytes"] = None
        if args.memory:
            at(f"memory of {row['method']}")
            row["peak_bytes"] = peak_of(
                {
                    "method": row["method"],
                    "model": args.model,
                    "device": args.device,
                    "worker": args.worker,
                    "rank": args.rank,
                    "interval": args.interval,
                    "capture_interval": args.capture_interval,
                }
            )


def _show(content: dict[str, Any]) -> None:
    from distcurv.bench.show import show_table

    settings = content["settings"]
    base = content["results"][0]["peak_bytes"]
    rows = []
    for row in content["results"]:
        ms, over, worst = row["step_ms"], row["over_sgd"], row["worst_over_median"]
        cpu, phases = row["cpu_over_sgd"], row["phases_ms"]
        share = row["capture_share"]
        peak = row["peak_bytes"]
        rows.append(
            [
                row["method"],
                f"{over['median']:.2f} ({over['min']:.2f} to {over['max']:.2f})",
                f"{cpu['median']:.2f} ({cpu['min']:.2f} to {cpu['max']:.2f})",
                f"{ms['mean']:.2f}",
                f"{ms['median']:.2f}",
                f"{ms['p99']:.2f}",
                f"{worst['median']:.2f}",
                *("" if phases[name] is None else f"{phases[name]:.2f}" for name in phases),
                "" if share is None else f"{share['median']:.1%}",
                "" if peak is None else f"{peak / 1e6:.0f} ({(peak - base) / 1e6:+.0f})",
            ]
        )
    show_table(
        f"{settings['model']}, ms per step; worker {settings['worker']}, r = {settings['rank']}, "
        f"interval {settings['interval']}",
        (
            *("method", "mean over sgd", "CPU over sgd", "mean", "median", "p99"),
            *("worst / median", "fwd+bwd", "capture", "exchange", "refresh", "apply"),
            *("capture of its step", "peak MB"),
        ),
        rows,
    )


def draw(path: Path, content: dict[str, Any]) -> None:
    """The mean step's parts, stacked; and the ratio to SGD with its spread."""
    from distcurv.bench.picture import new_figure, save
    from distcurv.bench.step_phases import PHASES

    rows = content["results"]
    figure, (parts, ratio) = new_figure(2, height=0.45 * len(rows) + 2.2)
    places = list(range(len(rows)))
    left = [0.0] * len(rows)
    for phase in PHASES:
        values = [row["phases_ms"][phase] or 0.0 for row in rows]
        if any(values):
            parts.barh(places, values, left=left, label=phase.replace("_", " + "))
            left = [start + value for start, value in zip(left, values, strict=True)]
    parts.set_xlabel("ms per step, mean")
    parts.legend(fontsize=8)
    middle = [row["over_sgd"]["median"] for row in rows]
    down = [row["over_sgd"]["median"] - row["over_sgd"]["min"] for row in rows]
    up = [row["over_sgd"]["max"] - row["over_sgd"]["median"] for row in rows]
    ratio.errorbar(middle, places, xerr=(down, up), fmt="o", capsize=3)
    ratio.axvline(1.0, color="#7a7a7a", linewidth=0.8)
    ratio.set_xlabel("mean step over SGD's, median and extremes of the repetitions")
    for axes in (parts, ratio):
        axes.set_yticks(places, [row["method"] for row in rows])
        axes.invert_yaxis()
        axes.grid(True, axis="x", alpha=0.2)
    settings = content["settings"]
    save(
        figure,
        path,
        f"{settings['model']} on {content['machine']['device']}, one thread; worker "
        f"{settings['worker']}, r = {settings['rank']}, interval {settings['interval']}",
    )
