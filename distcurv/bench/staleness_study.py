"""What `bench staleness` trains and the rows that come of it.  Pure.

Two arms: with eigenvalue correction (LowRankSOAP: stale bases, fresh scales) and without (low-rank
K-FAC, grafted, over SGD with momentum: bases and scales of one age).  Each tunes its learning rate
for each batch size at the first delay, and keeps it for the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

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
ARMS: Mapping[str, str] = {"with": "lowrank-soap", "without": "kfac"}


@dataclass(frozen=True)
class StalenessStudy:
    """One task's part of the study.

    Attributes:
        task: a key of ``TASKS``.
        batches: loss terms of a batch: images, or tokens.
        arms: keys of `ARMS`.
        delays: values of ``install_delay`` in steps; rates are tuned at the first.
        points: learning rates that are tried for each batch and arm, on seed 0.
        seeds: trainings of each delay.
        steps: of a training.
        interval: steps between two installs.
        device: ``cpu`` or ``cuda``.
    """

    task: str
    batches: Sequence[int]
    arms: Sequence[str]
    delays: Sequence[int]
    points: int
    seeds: int
    steps: int
    interval: int
    device: str = "cpu"

    def request(self, arm: str, batch: int, delay: int, k: int, seed: int) -> Request:
        """A training in process, every version installed exactly ``delay`` steps late."""
        return Request(
            self.task,
            ARMS[arm],
            learning_rate(k),
            seed,
            self.steps,
            batch,
            min(TASKS[self.task].eval_every, self.steps),
            install_delay=delay,
            interval=self.interval,
            device=self.device,
        )

    def tried(self, arm: str, batch: int, known: Known) -> dict[int, float]:
        """Losses at the first delay by the k of their learning rate."""
        return tried_so_far(
            STARTS[ARMS[arm]],
            self.points,
            lambda k: loss_of(known.get(self.request(arm, batch, self.delays[0], k, 0))),
        )

    def wanted(self, known: Known) -> Iterator[Request]:
        """Trainings that can be named already."""
        for batch in self.batches:
            for arm in self.arms:
                tried = self.tried(arm, batch, known)
                if len(tried) < self.points:
                    for k in next_points(STARTS[ARMS[arm]], self.points, tried):
                        yield self.request(arm, batch, self.delays[0], k, 0)
                    continue
                yield from self._at_best(arm, batch, best(tried))

    def _at_best(self, arm: str, batch: int, k: int) -> Iterator[Request]:
        for delay in self.delays:
            for seed in range(self.seeds):
                yield self.request(arm, batch, delay, k, seed)

    def trainings(self) -> int:
        """How many there will be."""
        each = self.points + len(self.delays) * self.seeds - 1
        return len(self.batches) * len(self.arms) * each

    def rows(self, known: Known) -> list[dict[str, Any]]:
        """One row for each batch size, arm and delay."""
        rows = []
        for batch in self.batches:
            for arm in self.arms:
                tried = self.tried(arm, batch, known)
                k = best(tried)
                own = [self._row(arm, batch, delay, k, known) for delay in self.delays]
                base = own[0]["mean"]
                for row in own:
                    mean = row["mean"]
                    row["over_first_delay"] = mean / base - 1 if mean and base else None
                    row["best_is_inside"] = min(tried) < k < max(tried)
                    row["tried"] = [
                        {"lr": learning_rate(point), "final": self._final(arm, batch, point, known)}
                        for point in sorted(tried)
                    ]
                rows += own
        return rows

    def _final(self, arm: str, batch: int, k: int, known: Known) -> float | None:
        final: float | None = known[self.request(arm, batch, self.delays[0], k, 0)]["final"]
        return final

    def _row(self, arm: str, batch: int, delay: int, k: int, known: Known) -> dict[str, Any]:
        results = [known[self.request(arm, batch, delay, k, seed)] for seed in range(self.seeds)]
        finals = [result["final"] for result in results]
        good = [final for final in finals if final is not None]
        staleness = [r["counts"]["max_staleness"] for r in results]
        return {
            "task": self.task,
            "batch": batch,
            "eigenvalue_correction": arm,
            "method": results[0]["about"],
            "install_delay": delay,
            "lr": learning_rate(k),
            "final_losses": finals,
            "mean": fmean(good) if len(good) == len(finals) else None,
            "min": min(good, default=None),
            "max": max(good, default=None),
            "diverged": len(finals) - len(good),
            "max_staleness": max(staleness),
        }
