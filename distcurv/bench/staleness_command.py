"""``distcurv bench staleness``: final loss of LowRankSOAP against the age of what it installs.

In process and in the deterministic mode: a version based on step t is installed exactly at t + k,
so two delays differ in nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distcurv.bench.arguments import at_least, numbers
from distcurv.errors import ConfigError

_TASKS = ("autoencoder", "charlm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``distcurv bench staleness``."""
    add = parser.add_argument
    add("--task", default="autoencoder", help=f"{' or '.join(_TASKS)} of distcurv demo (default "
        "autoencoder)")  # fmt: skip
    add(
        "--delays",
        type=numbers(0),
        default=(0, 5, 20, 50, 100),
        metavar="LIST",
        help="values of install_delay in steps (default 0,5,20,50,100)",
    )
    add("--seeds", type=at_least(1), default=3, metavar="N", help="trainings each (default 3)")
    add("--steps", type=at_least(1), metavar="N", help="of each training (default: the task's)")
    add("--rank", type=at_least(1), default=16, metavar="R", help="the low rank r (default 16)")
    add(
        "--interval",
        type=at_least(1),
        default=10,
        metavar="T",
        help="steps between two installs (default 10)",
    )
    add("--lr", type=float, metavar="LR", help="of LowRankSOAP (default: the task's)")


def run(args: argparse.Namespace) -> int:
    """Train, print, write."""
    import importlib.util

    from distcurv.bench.clock import one_thread
    from distcurv.bench.output import Record
    from distcurv.bench.show import Bar, show_files, show_table
    from distcurv.demo.tasks import TASKS

    if args.task not in _TASKS:
        raise ConfigError(f"--task is {args.task!r}: choose one of {', '.join(_TASKS)}")
    if args.lr is not None and not 0 < args.lr < float("inf"):
        raise ConfigError(f"--lr is {args.lr}: give a number > 0")
    if args.task == "autoencoder" and importlib.util.find_spec("sklearn") is None:
        raise ConfigError("--task autoencoder needs scikit-learn: pip install 'distcurv[bench]'")
    task = TASKS[args.task]
    steps = args.steps or task.default_steps
    lr = args.lr or task.distcurv_lr
    settings = {
        "task": args.task,
        "steps": steps,
        "seeds": list(range(args.seeds)),
        "rank": args.rank,
        "interval": args.interval,
        "lr": lr,
        "baseline_lr": task.baseline_lr,
        "loss_unit": task.unit,
    }
    record = Record(args, settings)
    delays: list[int | None] = [None, *args.delays]
    with one_thread(), Bar("staleness", len(delays) * args.seeds) as bar:
        rows = [
            row_of(args.task, delay, args.seeds, steps, args.rank, args.interval, lr, bar)
            for delay in delays
        ]
    content = record.write(rows)
    draw(record.picture, content)
    show_table(
        f"{args.task}, {steps} steps, r = {args.rank}, T = {args.interval}: final loss "
        f"({task.unit})",
        ("training", "mean", "min", "max", "seeds", "over delay " + str(args.delays[0])),
        _cells(rows),
    )
    show_files(record.file, record.picture)
    return 0


def row_of(
    task: str,
    delay: int | None,
    seeds: int,
    steps: int,
    rank: int,
    interval: int,
    lr: float,
    bar: Any,
) -> dict[str, Any]:
    """All seeds of one delay; the baseline AdamW where it is None."""
    from statistics import fmean

    losses: list[float] = []
    staleness: list[int] = []
    for seed in range(seeds):
        bar.at("AdamW" if delay is None else f"delay {delay}")
        loss, worst = train(task, delay, seed, steps, rank, interval, lr)
        losses.append(loss)
        staleness.append(worst)
        bar.advance()
    return {
        "method": "AdamW" if delay is None else "LowRankSOAP",
        "install_delay": delay,
        "final_losses": losses,
        "mean": fmean(losses),
        "min": min(losses),
        "max": max(losses),
        "max_staleness": None if delay is None else max(staleness),
    }


def train(
    task_name: str, delay: int | None, seed: int, steps: int, rank: int, interval: int, lr: float
) -> tuple[float, int]:
    """One training; its final loss and the largest staleness that occurred.

    Raises:
        StateError: the loss is not finite at the end.
    """
    import math

    import torch

    from distcurv.demo.tasks import TASKS
    from distcurv.demo.train import BETAS
    from distcurv.errors import StateError
    from distcurv.optim.lowrank_soap import LowRankSOAP

    task = TASKS[task_name]
    model = task.build(seed)
    ours: LowRankSOAP | None = None
    optimizer: torch.optim.Optimizer
    if delay is None:
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=task.baseline_lr, betas=BETAS, weight_decay=task.weight_decay
        )
    else:
        optimizer = ours = LowRankSOAP(
            model,
            lr=lr,
            betas=BETAS,
            weight_decay=task.weight_decay,
            rank=rank,
            workers="inline",
            preconditioner_upd_interval=interval,
            curvature_upd_interval=min(2, interval),
            install_delay=delay,
            seed=seed,
        )
    try:
        for step in range(steps):
            optimizer.zero_grad(set_to_none=True)
            task.loss(model, task.batches(step, 0, 1, seed)).backward()
            optimizer.step()
        loss = task.evaluate(model)
        worst = 0 if ours is None else int(ours.metrics()["max_staleness"])
    finally:
        if ours is not None:
            ours.close()
    if not math.isfinite(loss):
        raise StateError(
            f"{task_name} with delay {delay} and seed {seed} ended with the loss {loss}: give a "
            "lower --lr"
        )
    return loss, worst


def _cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    first = rows[1]["mean"]
    form: Callable[[float], str] = lambda value: f"{value:.4f}"  # noqa: E731
    return [
        [
            row["method"] if row["install_delay"] is None else f"delay {row['install_delay']}",
            form(row["mean"]),
            form(row["min"]),
            form(row["max"]),
            str(len(row["final_losses"])),
            f"{row['mean'] / first - 1:+.1%}",
        ]
        for row in rows
    ]


def draw(path: Path, content: dict[str, Any]) -> None:
    """Mean final loss against the delay, every seed as a point, and AdamW as a band."""
    from distcurv.bench.picture import OURS, PEER, new_figure, save

    figure, (axes,) = new_figure(1, width=7)
    baseline, *ours = content["results"]
    axes.axhspan(baseline["min"], baseline["max"], color=PEER, alpha=0.2)
    axes.axhline(baseline["mean"], color=PEER, label=f"AdamW: {baseline['mean']:.4g}")
    delays = [row["install_delay"] for row in ours]
    axes.plot(delays, [row["mean"] for row in ours], "o-", color=OURS, label="LowRankSOAP")
    for row in ours:
        points = row["final_losses"]
        axes.plot([row["install_delay"]] * len(points), points, ".", color=OURS, alpha=0.5)
    settings = content["settings"]
    axes.set_xlabel("install_delay (steps)")
    axes.set_ylabel(f"final loss ({settings['loss_unit']})")
    axes.grid(True, alpha=0.2)
    axes.legend()
    save(
        figure,
        path,
        f"{settings['task']}, {settings['steps']} steps, r = {settings['rank']}, "
        f"T = {settings['interval']}, {len(settings['seeds'])} seeds",
    )
