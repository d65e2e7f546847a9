"""Runs the methods of `bench step` in turn and makes the rows of its table.

All of them live in one process and take turns in each repetition, first to last and last to
first, so that whatever disturbs the machine disturbs them alike.  What is reported over SGD is a
ratio within one repetition; its spread over the repetitions says how far to believe it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import Any

from distcurv.bench.step_crew import Member
from distcurv.bench.step_phases import PHASES
from distcurv.bench.summary import spread, times
from distcurv.errors import StateError

BASELINE = "sgd"


def warm_up_steps(interval: int) -> int:
    """Past the early phase and the first install that a worker made."""
    return 3 * interval + 3


def run_steps(member: Member, steps: int, *, timed: bool) -> None:
    """A turn of one method.

    Raises:
        StateError: its loss is not finite any more; such a step's time means nothing."""
    pipeline = member.trainer.pipeline
    turn: list[float] = []
    loss = None
    processor = time.process_time()
    for _ in range(steps):
        captures = pipeline is not None and pipeline.capture_due
        loss = member.trainer.train_step()
        spent = member.trainer.clock.stop()
        if timed:
            turn.append(1e3 * sum(spent.values()))
            member.phases.append({name: 1e3 * seconds for name, seconds in spent.items()})
            member.captured.append(captures)
    if loss is not None and not math.isfinite(float(loss.detach())):
        raise StateError(f"the loss of {member.name} is not finite: its times mean nothing")
    if timed:
        member.step_ms.append(turn)
        member.cpu_ms.append(1e3 * (time.process_time() - processor) / steps)


def take_turns(
    crew: Sequence[Member], repetitions: int, steps: int, at: Callable[[str], None]
) -> None:
    """Every method once in each repetition, forwards and backwards by turns."""
    for repetition in range(repetitions):
        for member in crew if repetition % 2 == 0 else reversed(crew):
            at(member.name)
            with member.alone():
                run_steps(member, steps, timed=True)
            member.settle()


def row_of(member: Member, baseline: Member) -> dict[str, Any]:
    """What the record says of one method.

    ``over_sgd`` is the mean step over SGD's mean step of the same repetition; ``worst_over_median``
    the slowest step of a repetition over its median step; both as median over the repetitions
    between the extremes.  ``cpu_over_sgd`` compares the processor time of this process, all its
    threads, as ``over_sgd`` compares wall time: on one core both agree unless somebody else uses
    the machine (or the device is a GPU), and then this one is closer to what a quiet machine
    shows.  ``phases_ms`` are means over all steps; a phase that does not occur, or
    cannot be told apart, is None.  ``capture_share`` is capture's share of the steps that take
    statistics.
    """
    singles = [ms for turn in member.step_ms for ms in turn]
    occurring = {name for spent in member.phases for name in spent}
    phases = {
        name: fmean(spent.get(name, 0.0) for spent in member.phases) if name in occurring else None
        for name in PHASES
    }
    on_capture = [
        spent.get("capture", 0.0) / sum(spent.values())
        for spent, captured in zip(member.phases, member.captured, strict=True)
        if captured
    ]
    return {
        "method": member.name,
        "about": member.trainer.about,
        "step_ms": times(singles),
        "over_sgd": spread(
            [
                fmean(ours) / fmean(theirs)
                for ours, theirs in zip(member.step_ms, baseline.step_ms, strict=True)
            ]
        ),
        "cpu_over_sgd": spread(
            [ours / theirs for ours, theirs in zip(member.cpu_ms, baseline.cpu_ms, strict=True)]
        ),
        "worst_over_median": spread([max(turn) / median(turn) for turn in member.step_ms]),
        "phases_ms": phases,
        "capture_share": spread(on_capture) if on_capture else None,
        "turns_ms": member.step_ms,
    }
