"""The command ``distcurv``: finds the sub-command and turns bad values into one clear line.

A sub-command is a module with ``add_arguments(parser)`` and ``run(args) -> int``, imported only
when it is asked for, so that help is quick.  Exit codes: 0 success, 2 a bad value, 1 any other
failure that distcurv raises on purpose; ``distcurv run`` returns the exit code of the script.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from distcurv import __version__
from distcurv.errors import ConfigError, DistcurvError, EndpointError

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("distcurv.demo.command", "train on real data with and without distcurv, and compare"),
    "run": ("distcurv.launcher.run_command", "start workers, then a training script with torchrun"),
    "worker": ("distcurv.launcher.worker_command", "one curvature worker"),
    "inspect": ("distcurv.inspection.command", "show which parameters of a model are covered"),
    "bench": ("distcurv.bench.command", "measure steps, refreshes, messages and staleness"),
}

BAD_VALUE = 2
FAILED = 1
INTERRUPTED = 130


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line on stderr, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_VALUE, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = _parse_command(words[:1])
    module_name, purpose = COMMANDS[name]
    parser = OneLineParser(prog=f"distcurv {name}", description=purpose, allow_abbrev=False)
    try:
        # Within: loading torch takes seconds, in which Ctrl-C may come as well.
        module = importlib.import_module(module_name)
        module.add_arguments(parser)
        if name == "run":  # what follows the script belongs to the script, whatever it looks like
            ours, passed_on = module.split(words[1:])
            args = parser.parse_args(ours)
            args.passed_on = passed_on
        else:
            args = parser.parse_args(words[1:])
        return int(module.run(args))
    except DistcurvError as error:
        line = " ".join(str(error).split())
        print(f"{parser.prog}: error: {line}", file=sys.stderr)
        return BAD_VALUE if isinstance(error, ConfigError | EndpointError) else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def _parse_command(words: Sequence[str]) -> str:
    """The sub-command's name; prints help or an error and exits when there is none."""
    lines = "\n".join(f"  {name:<8} {purpose}" for name, (_, purpose) in COMMANDS.items())
    parser = OneLineParser(
        prog="distcurv",
        usage="distcurv COMMAND [options]",
        description="Second-order training for PyTorch, with the curvature computed by workers.",
        epilog=f"commands:\n{lines}\n\n'distcurv COMMAND --help' tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"distcurv {__version__}")
    if words == ["--version"]:
        parser.parse_args(words)
    if not words or words[0] in ("-h", "--help"):
        parser.print_help()
        parser.exit(0 if words else BAD_VALUE)
    if words[0] not in COMMANDS:
        parser.error(f"unknown command {words[0]!r}: choose one of {', '.join(COMMANDS)}")
    return words[0]
