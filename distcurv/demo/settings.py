"""What a demo run is asked to do: one frozen value, checked once, handed to every rank as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from distcurv.config import MAX_DELAY_WINDOWS, SoapConfig
from distcurv.demo.tasks import TASKS, Task
from distcurv.errors import ConfigError

LARGEST_SEED = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """A demo run, up to where its results go.

    Attributes:
        task: a key of `distcurv.demo.tasks.TASKS`.
        steps: optimizer steps of each of the two trainings; None takes the task's default.
        ranks: training ranks.
        workers: curvature workers, each a process; 0 refreshes inside the ranks.
        rank: the low rank r.
        install_delay: None for real asynchrony, k for installs exactly k steps later.
        seed: of the initial weights, the data order and the first bases.

    Raises:
        ConfigError: a value cannot work; names the option, the value and what to give.
    """

    task: str = "autoencoder"
    steps: int | None = None
    ranks: int = 2
    workers: int = 1
    rank: int = 64
    install_delay: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ConfigError(f"--task is {self.task!r}: choose one of {', '.join(TASKS)}")
        at_least("--nproc-per-node", self.ranks, 1)
        at_least("--workers", self.workers, 0)
        at_least("--rank", self.rank, 1)
        at_least("--seed", self.seed, 0)
        at_most("--seed", self.seed, LARGEST_SEED)
        if self.steps is not None:
            at_least("--steps", self.steps, 1)
        if self.install_delay is not None:
            at_least("--install-delay", self.install_delay, 0)
            # The demo keeps the interval's default.
            at_most(
                "--install-delay",
                self.install_delay,
                MAX_DELAY_WINDOWS * SoapConfig().resolved_preconditioner_upd_interval,
            )
        batch = TASKS[self.task].global_batch
        if self.ranks > batch:
            raise ConfigError(
                f"--nproc-per-node is {self.ranks}: {self.task} has {batch} samples per step, "
                f"so give at most {batch}"
            )

    @property
    def problem(self) -> Task:
        """The task itself."""
        return TASKS[self.task]

    @property
    def resolved_steps(self) -> int:
        """``steps``, or the task's default."""
        return self.problem.default_steps if self.steps is None else self.steps

    def to_json(self) -> str:
        """For the command line of the ranks."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> DemoSettings:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))


def output_directory(name: str) -> Path:
    """The directory for the results, made if need be.

    Raises:
        ConfigError: it cannot be made or written.
    """
    path = Path(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out is {name!r}: {error.strerror}; give another directory") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(f"--out is {name!r}: it cannot be written; give another directory")
    return path


def at_most(option: str, value: int, high: int) -> None:
    """Raise `ConfigError` for a larger value of an option."""
    if value > high:
        raise ConfigError(f"{option} is {value}: give a whole number of at most {high}")


def at_least(option: str, value: int, low: int) -> None:
    """Raise `ConfigError` for a smaller value of an option."""
    if value < low:
        raise ConfigError(f"{option} is {value}: give a whole number of at least {low}")
