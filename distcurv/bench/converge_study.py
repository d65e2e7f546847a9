"""What `bench converge` trains, in which order: learning rates, seeds, longer runs, times.

Pure: from what is known so far to the trainings that are wanted next.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from distcurv.bench.converge_methods import SERVED
from distcurv.bench.converge_request import Request
from distcurv.bench.converge_search import (
    STARTS,
    best,
    learning_rate,
    loss_of,
    next_points,
    tried_so_far,
)
from distcurv.bench.converge_tasks import TASKS

Known = Mapping[Request, dict[str, Any]]

_FIRST_STEPS = {True: 60, False: 20}  # before a step's time is steady; with and without workers
_STEADY_STEPS = 20
_NO_RANKS = ("asdl-kfac",)  # brings its own distribution, which needs CUDA


@dataclass(frozen=True)
class Study:
    """One task's part of the study.

    Attributes:
        task: a key of ``TASKS``.
        methods: keys of ``MAKERS``.
        points: learning rates that each method tries, on seed 0.
        seeds: trainings at the best of them.
        steps: of a training.
        stretch: methods short of the target loss get so many times the steps.
        target_of: the method whose loss at the end is the target; None for no target.
        install_delay: None for real asynchrony of distcurv's methods.
        equal: whether two cores are timed too.
        repetitions: of every timing.
        device: ``cpu`` or ``cuda``.
    """

    task: str
    methods: Sequence[str]
    points: int
    seeds: int
    steps: int
    stretch: int
    target_of: str | None
    install_delay: int | None
    equal: bool
    repetitions: int
    device: str = "cpu"

    def request(self, method: str, k: int, seed: int) -> Request:
        """A training with the k-th learning rate."""
        task = TASKS[self.task]
        return Request(
            self.task,
            method,
            learning_rate(k),
            seed,
            self.steps,
            task.rows,
            min(task.eval_every, self.steps),
            install_delay=self.install_delay if method in SERVED else None,
            device=self.device,
        )

    def longer(self, method: str, k: int, seed: int, target: float) -> Request:
        """The same, until the target is reached, or ``stretch`` times the steps are over."""
        short = self.request(method, k, seed)
        return Request(**{**vars(short), "steps": self.stretch * self.steps, "stop_at": target})

    # -- losses ---------------------------------------------------------------------------

    def tried(self, method: str, known: Known) -> dict[int, float]:
        """Losses of the settings that count as tried, by k."""
        return tried_so_far(
            STARTS[method],
            self.points,
            lambda k: loss_of(known.get(self.request(method, k, 0))),
        )

    def searched(self, method: str, known: Known) -> bool:
        """Whether all settings were tried."""
        return len(self.tried(method, known)) == self.points

    def at_best(self, method: str, known: Known) -> list[Request]:
        """Every seed at the best learning rate; needs `searched`."""
        k = best(self.tried(method, known))
        return [self.request(method, k, seed) for seed in range(self.seeds)]

    def target(self, known: Known) -> float | None:
        """The loss to be reached, once it is known; None too where its method diverged."""
        if self.target_of is None or not self.searched(self.target_of, known):
            return None
        results = [known.get(request) for request in self.at_best(self.target_of, known)]
        finals = [None if result is None else result["final"] for result in results]
        if any(final is None for final in finals):
            return None
        return fmean(final for final in finals if final is not None)

    def losses_wanted(self, known: Known) -> Iterator[Request]:
        """Trainings for the losses that are not known yet and can be named already."""
        for method in self.methods:
            for k in next_points(STARTS[method], self.points, self.tried(method, known)):
                yield self.request(method, k, 0)
            if self.searched(method, known):
                k = best(self.tried(method, known))
                yield from (self.request(method, k, seed) for seed in range(1, self.seeds))
                # What a learning rate 1.5 times off costs; not tried settings, if they are new.
                yield from (self.request(method, k + off, 0) for off in (-1, 1))
        target = self.target(known)
        if target is None or self.stretch == 1:
            return
        for method in self.methods:
            if method == self.target_of or not self.searched(method, known):
                continue
            k = best(self.tried(method, known))
            for seed in range(self.seeds):
                result = known.get(self.request(method, k, seed))
                if result is not None and not _reached(result, target):
                    yield self.longer(method, k, seed, target)

    # -- times ----------------------------------------------------------------------------

    def modes(self, method: str) -> tuple[str, ...]:
        """Kinds of hardware that a method is timed on."""
        if method in SERVED or not self.equal:
            return ("one",)
        return ("one", "threads") if method in _NO_RANKS else ("one", "threads", "ranks")

    def timing(self, method: str, k: int, mode: str, repetition: int) -> Request:
        """A short training for the times of its steps."""
        first = _FIRST_STEPS[method in SERVED]
        return Request(
            self.task,
            method,
            learning_rate(k),
            0,
            first + _STEADY_STEPS,
            TASKS[self.task].rows,
            0,
            install_delay=self.install_delay if method in SERVED else None,
            hardware=mode,
            repetition=repetition,
            device=self.device,
        )

    def times_wanted(self, known: Known) -> list[Request]:
        """Timings, to be run one at a time; in each repetition in another random order."""
        wanted: list[Request] = []
        for repetition in range(self.repetitions):
            turn = [
                self.timing(method, best(self.tried(method, known)), mode, repetition)
                for method in self.methods
                for mode in self.modes(method)
            ]
            random.Random(repetition).shuffle(turn)
            wanted += turn
        return wanted


def first_steps(method: str) -> int:
    """Steps of a timing before its steady part: they hold an early phase, first bases and such."""
    return _FIRST_STEPS[method in SERVED]


def _reached(result: Mapping[str, Any], target: float) -> bool:
    return any(loss <= target for _, loss in result["curve"])
