"""From trainings to the rows of `bench converge`'s table: losses, sensitivity, seconds.  Pure.

Seconds are steps times measured step times: t(n) counts the first steps as measured (median over
the repetitions of their sum) and every further one as the mean step of the steady part (median over
the repetitions).  So the losses may be found side by side on a busy machine, and the times in short
runs in turn on a quiet one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from distcurv.bench.converge_search import best, learning_rate
from distcurv.bench.converge_study import Known, Study, first_steps
from distcurv.bench.summary import spread

Row = dict[str, Any]


@dataclass(frozen=True)
class Pace:
    """How long steps take: the first ``first_n`` of them ``first_s``, then ``steady_s`` each."""

    first_n: int
    first_s: float
    steady_s: float

    def seconds(self, steps: float) -> float:
        """Until so many steps are done."""
        if steps <= self.first_n:
            return self.first_s * steps / self.first_n
        return self.first_s + (steps - self.first_n) * self.steady_s


def pace_of(turns: Sequence[Sequence[float]], first_n: int) -> Pace:
    """From the step times (seconds) of every repetition."""
    return Pace(
        first_n,
        median(sum(turn[:first_n]) for turn in turns),
        median(fmean(turn[first_n:]) for turn in turns),
    )


def crossing(curve: Sequence[Sequence[float]], target: float) -> float | None:
    """Steps until a curve of (step, loss) is first at or below ``target``, linear between its
    points; None if it never is."""
    before: Sequence[float] | None = None
    for step, loss in curve:
        if loss <= target:
            if before is None:
                return step
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (step - before[0])
        before = (step, loss)
    return None


def rows_of(study: Study, known: Known) -> list[Row]:
    """One row for each method of a task."""
    target = study.target(known)
    rows = [_row(study, method, known, target) for method in study.methods]
    reference = next((row for row in rows if row["method"] == study.target_of), None)
    for row in rows:
        row["sooner_than_target_method"] = {
            name: _ratio(reference["seconds_to_target"][name], seconds) if reference else None
            for name, seconds in row["seconds_to_target"].items()
        }
    return rows


def _row(study: Study, method: str, known: Known, target: float | None) -> Row:
    tried = study.tried(method, known)
    k = best(tried)
    at_best = [known[request] for request in study.at_best(method, known)]
    finals = [result["final"] for result in at_best]
    good = [final for final in finals if final is not None]
    steps = _steps_to_target(study, method, k, known, target)
    paces = _paces(study, method, k, known)
    return {
        "task": study.task,
        "method": method,
        "about": at_best[0]["about"],
        "best_lr": learning_rate(k),
        "finals": finals,
        "mean": fmean(good) if good and len(good) == len(finals) else None,
        "min": min(good, default=None),
        "max": max(good, default=None),
        # The search ended within what it tried, not at its edge.
        "best_is_inside": k - 1 in tried and k + 1 in tried,
        "lr_off": {
            name: _off(study, method, k, side, known)
            for name, side in (("lower", -1), ("higher", 1))
        },
        "tried": [
            {"lr": learning_rate(point), **_outcome(known[study.request(method, point, 0)])}
            for point in sorted(tried)
        ],
        "counts": [result["counts"] for result in at_best],
        "curves": [result["curve"] for result in at_best],
        "steps_to_target": steps,
        "pace": {mode: _pace_summary(paces[mode]) for mode in paces},
        "equal_hardware_is": _choice(paces),
        "seconds_to_target": {
            "one-core": _seconds(steps, paces.get("one")),
            **({"equal": _seconds(steps, paces.get(_choice(paces)))} if study.equal else {}),
        },
    }


def _outcome(result: Mapping[str, Any]) -> Row:
    return {"final": result["final"], "diverged_at": result["diverged"], "why": result["why"]}


def _off(study: Study, method: str, k: int, side: int, known: Known) -> Row:
    """A learning rate 1.5 times off, on seed 0, over the best one on seed 0."""
    here = known[study.request(method, k, 0)]["final"]
    there = known[study.request(method, k + side, 0)]["final"]
    over = None if here is None or there is None else there / here - 1
    return {"lr": learning_rate(k + side), "final": there, "over_best": over}


def _steps_to_target(
    study: Study, method: str, k: int, known: Known, target: float | None
) -> list[float | None]:
    """By seed.  The target's own method has reached it at its last step at the latest."""
    if target is None:
        return []
    found: list[float | None] = []
    for seed in range(study.seeds):
        steps = crossing(known[study.request(method, k, seed)]["curve"], target)
        if steps is None and method == study.target_of:
            steps = study.steps
        elif steps is None:
            longer = known.get(study.longer(method, k, seed, target))
            steps = None if longer is None else crossing(longer["curve"], target)
        found.append(steps)
    return found


def _paces(study: Study, method: str, k: int, known: Known) -> dict[str, Pace]:
    paces = {}
    for mode in study.modes(method):
        results = [
            known.get(study.timing(method, k, mode, repetition))
            for repetition in range(study.repetitions)
        ]
        turns = [r["step_s"] for r in results if r is not None and r["diverged"] is None]
        if turns:
            paces[mode] = pace_of(turns, first_steps(method))
    return paces


def _choice(paces: Mapping[str, Pace]) -> str:
    """What a method does with two cores: a second thread, a second rank, or nothing, whichever is
    fastest; distcurv's methods have their worker there already."""
    return min(paces, key=lambda mode: paces[mode].steady_s, default="one")


def _pace_summary(pace: Pace) -> Row:
    return {
        "step_ms": 1e3 * pace.steady_s,
        "first_steps": pace.first_n,
        "first_steps_ms": 1e3 * pace.first_s,
    }


def _seconds(steps: Sequence[float | None], pace: Pace | None) -> Row | None:
    """Median over seeds, between the extremes; None unless every seed reached the target."""
    reached = [each for each in steps if each is not None]
    if pace is None or not reached or len(reached) < len(steps):
        return None
    return spread([pace.seconds(each) for each in reached])


def _ratio(reference: Mapping[str, float] | None, own: Mapping[str, float] | None) -> float | None:
    if reference is None or own is None or not own["median"]:
        return None
    return reference["median"] / own["median"]
