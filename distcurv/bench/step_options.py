"""The options of ``distcurv bench step``: declared without torch, checked before anything runs."""

from __future__ import annotations

import argparse

from distcurv.bench.arguments import at_least, device, numbers, words
from distcurv.errors import ConfigError

MODELS = ("autoencoder", "charlm", "convnet")
WORKERS = ("process", "idle", "inline")
METHODS = (
    "sgd", "adamw", "muon", "lowrank-soap", "kfac", "kfac-dense", "soap", "shampoo", "singd",
    "asdl-kfac", "kfac-pytorch", "low-rank-asdl"
)  # fmt: skip
ALIASES = {"distcurv": "lowrank-soap"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``distcurv bench step``."""
    add = parser.add_argument
    add("--model", default="autoencoder", help=f"{', '.join(MODELS)} (default autoencoder)")
    add(
        "--methods",
        type=words((*METHODS, *ALIASES)),
        default=("sgd", "adamw", "lowrank-soap", "kfac"),
        metavar="LIST",
        help=f"some of {', '.join(METHODS)}, or distcurv for lowrank-soap (default "
        "sgd,adamw,lowrank-soap,kfac); sgd is always among them",
    )
    add(
        "--rank",
        type=numbers(1),
        default=(32,),
        metavar="LIST",
        help="low ranks r; methods that have one run once with each (default 32)",
    )
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
        metavar="N",
        help="steps between two statistics of distcurv's methods (default: the library's)",
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
        help="steps of a turn, a multiple of the interval (default: twice the interval); a method "
        "that repeats itself less often takes as many more as it needs",
    )
    add(
        "--worker",
        type=words(WORKERS),
        default=("process",),
        metavar="LIST",
        help="how distcurv's methods refresh, each once with each: process (on another core, "
        "default), idle (as process, but stopped while a step is timed, so that the interference "
        "of process shows), inline (in the training process)",
    )
    add(
        "--memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also measure each method's memory, in a process of its own (default yes)",
    )
    add("--device", default="cpu", help="cpu (default) or cuda")


def methods_of(args: argparse.Namespace) -> tuple[str, ...]:
    """The methods by their own names, once all options are found good.

    Raises:
        ConfigError: an option has a value that cannot work, or a method's package is missing.
    """
    from distcurv.bench.step_peers import PEERS, require_package

    if args.model not in MODELS:
        raise ConfigError(f"--model is {args.model!r}: choose one of {', '.join(MODELS)}")
    device(args.device)
    if args.capture_interval is not None and args.capture_interval > args.interval:
        raise ConfigError(
            f"--capture-interval is {args.capture_interval}: give at most --interval "
            f"({args.interval})"
        )
    if args.steps is not None and args.steps % args.interval:
        raise ConfigError(
            f"--steps is {args.steps}: give a multiple of --interval ({args.interval}), so that "
            "every turn has its share of refreshes"
        )
    names = tuple(ALIASES.get(name, name) for name in args.methods)
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--methods names {name} twice, once as another name: leave one out")
        if name in PEERS:
            require_package(name)
    return names
