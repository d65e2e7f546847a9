"""Which words before the script are torchrun's options, so that the script's stay its own.

Written down here because asking torchrun's parser would import torch in the launcher; a test
compares these names with the parser of the installed torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from distcurv.errors import ConfigError

FLAGS = frozenset(
    {"--standalone", "--module", "-m", "--no-python", "--run-path", "--virtual-local-rank"}
)
WITH_VALUE = frozenset(
    {
        "--nnodes",
        "--nproc-per-node",
        "--rdzv-backend",
        "--rdzv-endpoint",
        "--rdzv-id",
        "--rdzv-conf",
        "--max-restarts",
        "--monitor-interval",
        "--start-method",
        "--event-log-handler",
        "--role",
        "--log-dir",
        "--redirects",
        "-r",
        "--tee",
        "-t",
        "--local-ranks-filter",
        "--duplicate-stdout-filters",
        "--duplicate-stderr-filters",
        "--node-rank",
        "--master-addr",
        "--master-port",
        "--local-addr",
        "--logs-specs",
        "--numa-binding",
        "--signals-to-handle",
        "--shutdown-timeout",
    }
)
# Any of these says how the nodes find each other, so --standalone must not be added.
_RENDEZVOUS = ("--rdzv-", "--master-", "--node-rank", "--standalone", "--local-addr")
_RENDEZVOUS_ENV = ("PET_NNODES", "PET_RDZV_", "PET_MASTER_", "PET_NODE_RANK", "PET_STANDALONE")


@dataclass
class Split:
    """The words of a command line by whom they are meant for."""

    own: list[str] = field(default_factory=list)
    torchrun: list[str] = field(default_factory=list)
    program: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)  # torchrun's options and their values


def split(words: Sequence[str], own_flags: frozenset[str], own_options: frozenset[str]) -> Split:
    """Split before the first word that is neither an option nor the value of one.

    Underscores in option names count as dashes, as for torchrun.  An option that is not known
    here is handed to torchrun if it is written ``--name=value``; otherwise `ConfigError`, because
    nobody could tell whether the next word is its value or the script.
    """
    result = Split()
    position = 0
    while position < len(words):
        word = words[position]
        if word == "--":
            position += 1
            break
        if not word.startswith("-") or word == "-":
            break
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        is_own = name in own_flags or name in own_options
        target = result.own if is_own else result.torchrun
        takes = 1
        if equals or name in FLAGS or name in own_flags:
            target.append(name + equals + value)
        elif name in WITH_VALUE or name in own_options:
            if position + 1 == len(words):
                raise ConfigError(f"{word} needs a value")
            value, takes = words[position + 1], 2
            target += [name, value]
        else:
            raise ConfigError(
                f"unknown option {word} before the script (if it is an option of a newer "
                f"torchrun, write it as {word}=VALUE)"
            )
        if not is_own:
            result.names[name] = value
        position += takes
    result.program = list(words[position:])
    return result


def check(parts: Split) -> None:
    """Refuse what torchrun would refuse only after the workers were started."""
    per_node = parts.names.get("--nproc-per-node", "1")
    if not re.fullmatch(r"[1-9]\d*|auto|cpu|gpu|xpu", per_node):
        raise ConfigError(
            f"--nproc-per-node {per_node}: must be a number from 1 up, 'auto', 'cpu' or 'gpu'"
        )
    nodes = parts.names.get("--nnodes", "1")
    if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", nodes):
        raise ConfigError(f"--nnodes {nodes}: must be a number from 1 up, or MIN:MAX")
    as_file = not {"-m", "--module", "--no-python"} & parts.names.keys()
    if not parts.program:
        raise ConfigError("no script given: distcurv run [options] script.py ARGS")
    if as_file and not os.path.isfile(parts.program[0]):
        raise ConfigError(
            f"no such script: {parts.program[0]} (for a module put -m before it, "
            "for another program --no-python)"
        )


def with_rendezvous(parts: Split, env: Mapping[str, str]) -> list[str]:
    """torchrun's options, with ``--standalone`` added to a single-node job that names no meeting
    point: jobs side by side on one machine then do not fight over torchrun's default port."""
    single = parts.names.get("--nnodes", "1") in ("1", "1:1")
    named = any(name.startswith(_RENDEZVOUS) for name in parts.names) or any(
        name.startswith(_RENDEZVOUS_ENV) for name in env
    )
    return parts.torchrun if named or not single else ["--standalone", *parts.torchrun]
