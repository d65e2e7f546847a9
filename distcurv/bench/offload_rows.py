"""From turns to the rows of `bench offload`, and from rows to the constants of the rule.

What refreshing costs is always a difference or a ratio within one repetition: an arm's mean step
against the mean step of the same job without refreshes, a moment before or after.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

import torch

from distcurv.bench.offload_crew import Crew
from distcurv.bench.offload_points import PAIR_ARMS, SOLO_ARMS, Point
from distcurv.bench.summary import spread, times
from distcurv.errors import StateError
from distcurv.train.placement import (
    INLINE,
    WORKER,
    choose,
    exchanged_bytes,
    refresh_operations,
)

Turns = dict[tuple[str, str], list[dict[str, Any]]]
_FLOOR_S = 2e-4  # a window's cost is known no better than that


def measure_point(crew: Crew, point: Point, repetitions: int) -> Turns:
    """Turns by (job, arm): warm up, then all arms of a job forwards and backwards by turns.

    Raises:
        StateError: a process failed, or a refresh did."""
    turns: Turns = {}
    for job in crew.jobs:
        arms = SOLO_ARMS if job == "solo" else PAIR_ARMS
        crew.build(job, arms, point.fields())
        for arm in arms:
            turns[job, arm] = []
            crew.run(job, arm, point.warm_up_steps)
        for repetition in range(repetitions):
            for arm in arms if repetition % 2 == 0 else tuple(reversed(arms)):
                turn = crew.run(job, arm, point.turn_steps)
                if turn["failures"]:
                    raise StateError(f"{turn['failures']} refreshes of arm {arm} failed")
                turns[job, arm].append(turn)
        crew.drop()
    return turns


def row_of(point: Point, turns: Turns) -> dict[str, Any]:
    """What the record says of a point.

    By arm: ``over_none`` and ``cpu_over_none`` are its mean step over that without refreshes, in
    wall and in processor time (of the training process alone); ``window_ms`` and ``cpu_window_ms``
    what a window's exchange and refresh add to its T steps; ``kept_up`` the share of the turns'
    versions that came before their turn's poll, ``staleness`` the oldest applied, in steps.
    ``gain`` is the mean step with refreshes in process over that with a worker, and ``measured``
    the better place: ``even`` where the repetitions do not agree.  ``cpu_gain`` is the same in
    processor time, which others who use the machine disturb less.
    """
    arms = {}
    for (job, name), mine in turns.items():
        if name == "none":
            continue
        base = turns[job, "none"]
        arms[name] = {
            "step_ms": times([ms for turn in mine for ms in turn["ms"]]),
            "over_none": _compare(mine, base, _wall, _over),
            "cpu_over_none": _compare(mine, base, _cpu, _over),
            "window_ms": _compare(mine, base, _wall, lambda a, b: (a - b) * point.interval),
            "cpu_window_ms": _compare(mine, base, _cpu, lambda a, b: (a - b) * point.interval),
            "kept_up": fmean(turn["installs"] / point.blocks for turn in mine),
            "staleness": max(turn["staleness"] for turn in mine),
        }
    worker, inline = turns["solo", "worker"], turns["solo", "inline"]
    gain = _compare(inline, worker, _wall, _over)
    choice = choose(point.load(), [1])
    return {
        **point.fields(),
        "repetitions": len(worker),
        "none_ms": {
            job: times([ms for turn in mine for ms in turn["ms"]])
            for (job, name), mine in turns.items()
            if name == "none"
        },
        "arms": arms,
        "gain": gain,
        "cpu_gain": _compare(inline, worker, _cpu, _over),
        "measured": WORKER if gain["min"] > 1 else INLINE if gain["max"] < 1 else "even",
        "auto": choice.place,
        "auto_reason": choice.reason,
    }


def _wall(turn: dict[str, Any]) -> float:
    return fmean(turn["ms"])


def _cpu(turn: dict[str, Any]) -> float:
    return float(turn["cpu_ms"])


def _over(a: float, b: float) -> float:
    return a / b


def _compare(mine: Any, base: Any, value: Any, relation: Any) -> dict[str, float | int]:
    return spread([relation(value(a), value(b)) for a, b in zip(mine, base, strict=True)])


def fit(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The constants of `distcurv.train.placement.CALIBRATION` that fit these rows, in seconds per
    block, operation and byte, with the median relative error of each fit.

    From processor times, which other users of the machine disturb least."""
    kinds = sorted({row["kind"] for row in rows})
    inline = {
        kind: _rates([row for row in rows if row["kind"] == kind], INLINE, (0, 1, 2))
        for kind in kinds
    }
    return {"inline": inline, "worker": _rates(rows, WORKER, (0, 2))}


def _rates(
    rows: Sequence[dict[str, Any]], arm: str, usable: tuple[int, ...]
) -> dict[str, float] | None:
    """Non-negative least squares of the relative errors, by trying every subset of the terms."""
    if not rows:
        return None
    terms, targets, noise = [], [], []
    for row in rows:
        specs = Point(*(row[key] for key in Point.__dataclass_fields__)).specs()
        terms.append(
            [
                float(len(specs)),
                sum(refresh_operations(spec) for spec in specs),
                float(sum(exchanged_bytes(spec) for spec in specs)),
            ]
        )
        cost = row["arms"][arm]["cpu_window_ms"]
        targets.append(max(0.0, cost["median"] / 1e3))
        noise.append(max(_FLOOR_S, (cost["max"] - cost["min"]) / 2e3))
    A = torch.tensor(terms, dtype=torch.float64)
    b = torch.tensor(targets, dtype=torch.float64)
    # Relative errors count, but no row more than it is known to.
    weight = 1 / torch.maximum(b, torch.tensor(noise, dtype=torch.float64))
    best, least = torch.zeros(3, dtype=torch.float64), float("inf")
    for count in range(1, min(len(rows), len(usable)) + 1):
        for subset in combinations(usable, count):
            part = A[:, subset] * weight.unsqueeze(1)
            scale = part.norm(dim=0).clamp(min=1e-300)  # bytes and blocks differ by nine digits
            found = torch.linalg.lstsq(part / scale, (b * weight).unsqueeze(1)).solution[:, 0]
            found = found / scale
            error = float((part @ found - b * weight).norm())
            if bool((found >= 0).all()) and error < least:
                least, best = error, torch.zeros(3, dtype=torch.float64)
                best[list(subset)] = found
    off = ((A @ best - b) * weight).abs()
    block, operation, byte = (float(f"{value:.3g}") for value in best.tolist())
    return {
        "block": block,
        "operation": operation,
        "byte": byte,
        "median_relative_error": float(off.median()),
    }
