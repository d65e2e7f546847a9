"""What a run of ``distcurv demo --makers`` is asked to do: one frozen value, checked once."""

from __future__ import annotations

from dataclasses import dataclass

from distcurv.demo.makers_registry import DEFAULT_RANK, TASK
from distcurv.demo.settings import LARGEST_SEED, at_least, at_most
from distcurv.demo.tasks import TASKS, Task
from distcurv.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MakersSettings:
    """A comparison of gradient makers, up to where its results go.

    Attributes:
        names: keys of `distcurv.demo.makers_registry.CHOICES`, in the order of their trainings.
        task: the one that the makers' learning rates are for.
        steps: of each training; None takes the task's default.
        workers: curvature workers, each a process; 0 refreshes within the step.
        rank: the low rank r of the makers that have one.
        seed: of the initial weights, the data order and all draws.

    Raises:
        ConfigError: a value cannot work; names the option, the value and what to give.
    """

    names: tuple[str, ...]
    task: str = TASK
    steps: int | None = None
    workers: int = 0
    rank: int = DEFAULT_RANK
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task != TASK:
            raise ConfigError(
                f"--task is {self.task!r}: the learning rates of --makers are those of {TASK}, "
                "leave --task out"
            )
        if self.steps is not None:
            at_least("--steps", self.steps, 1)
        at_least("--workers", self.workers, 0)
        at_least("--rank", self.rank, 1)
        at_least("--seed", self.seed, 0)
        at_most("--seed", self.seed, LARGEST_SEED)

    @property
    def problem(self) -> Task:
        """The task itself."""
        return TASKS[self.task]

    @property
    def resolved_steps(self) -> int:
        """``steps``, or the task's default."""
        return self.problem.default_steps if self.steps is None else self.steps
