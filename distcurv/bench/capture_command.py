"""``distcurv bench capture``: what the capture costs a step, with statistics and without."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from distcurv.bench.arguments import at_least, device, words
from distcurv.bench.step_options import MODELS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``distcurv bench capture``."""
    add = parser.add_argument
    add(
        "--models",
        type=words(MODELS),
        default=MODELS,
        metavar="LIST",
        help=f"some of {', '.join(MODELS)} (default all)",
    )
    add("--rank", type=at_least(1), default=32, metavar="R", help="low rank r (default 32)")
    add(
        "--repetitions",
        type=at_least(1),
        default=20,
        metavar="N",
        help="turns of every variant (default 20)",
    )
    add(
        "--steps",
        type=at_least(1),
        default=3,
        metavar="N",
        help="steps of a turn, of which the fastest counts (default 3)",
    )
    add("--device", default="cpu", help="cpu (default) or cuda")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    device(args.device)
    from distcurv.bench.capture_turns import VARIANTS, measure
    from distcurv.bench.clock import choose_cores, one_thread, pinned
    from distcurv.bench.output import Record
    from distcurv.bench.show import Bar, show_files, show_table

    cores = choose_cores()
    settings = {
        "models": list(args.models),
        "rank": args.rank,
        "repetitions": args.repetitions,
        "steps_of_a_turn": args.steps,
        "core_of_training": cores.training,
    }
    record = Record(args, settings, args.device)
    rows = []
    with one_thread(), pinned(cores.training), Bar("capture", len(args.models)) as bar:
        for model in args.models:
            bar.at(model)
            rows += measure(model, args.device, args.rank, args.repetitions, args.steps)
            bar.advance()
    content = record.write(rows)
    draw(record.picture, content)
    show_table(
        "forward, backward and capture: ms, and over a turn without distcurv",
        ("model", "variant", "median", "quartiles", "ratio", "quartiles"),
        [_cells(row) for row in rows],
    )
    assert {row["variant"] for row in rows} == set(VARIANTS)
    show_files(record.file, record.picture)
    return 0


def _cells(row: dict[str, Any]) -> list[str]:
    ms, ratio = row["ms"], row["ratio"]
    return [
        row["model"],
        row["variant"],
        f"{ms['median']:.2f}",
        f"{ms['lower']:.2f} to {ms['upper']:.2f}",
        f"{ratio['median']:.3f}",
        f"{ratio['lower']:.3f} to {ratio['upper']:.3f}",
    ]


def draw(path: Path, content: dict[str, Any]) -> None:
    """Ratios of each model, the variants beside each other, with their quartiles."""
    from distcurv.bench.capture_turns import VARIANTS
    from distcurv.bench.picture import OURS, PEER, new_figure, save

    figure, (axes,) = new_figure(1, width=7)
    models = content["settings"]["models"]
    colours = (PEER, OURS, OURS)
    for place, (variant, colour) in enumerate(zip(VARIANTS, colours, strict=True)):
        found = [row["ratio"] for row in content["results"] if row["variant"] == variant]
        middle = [ratio["median"] for ratio in found]
        reach = [
            [ratio["median"] - ratio["lower"] for ratio in found],
            [ratio["upper"] - ratio["median"] for ratio in found],
        ]
        where = [index + 0.25 * (place - 1) for index in range(len(models))]
        axes.bar(
            where,
            middle,
            0.23,
            yerr=reach,
            capsize=3,
            color=colour,
            alpha=0.5 if variant == "disarmed" else 1.0,
            label=variant,
        )
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(models)), models)
    axes.set_ylabel("time over that without distcurv")
    axes.legend()
    save(figure, path, "What the capture adds to a step's forward and backward")
