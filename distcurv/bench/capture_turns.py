"""Measures a step's forward and backward without distcurv, with its capture at rest, and at work.

Three copies of a model take turns, first to last and last to first; a turn's time is compared with
that of the copy without distcurv in the same repetition, so that what disturbs the machine for
longer than a turn disturbs both.  That copy comes twice: how far its two turns are apart says what
this machine can tell apart.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from distcurv.bench.clock import work_time
from distcurv.bench.step_hooks import begin_captured_step, end_captured_step
from distcurv.bench.step_models import Problem, make_problem
from distcurv.bench.summary import percentile
from distcurv.config import KfacConfig
from distcurv.train.preconditioner import Preconditioner

# Without distcurv, a second time: the ratio of two equal things.  A step without statistics.  One
# with.
VARIANTS = ("none", "disarmed", "armed")
_NEVER = 1_000_000_000  # steps between two statistics: none comes
_WARM_UP_STEPS = 5


def measure(
    model: str, device: str, rank: int, repetitions: int, steps: int
) -> list[dict[str, Any]]:
    """One row for each of `VARIANTS`: times in ms, and ratios to the first copy's turn."""
    plain, twin, resting, working = (make_problem(model, device) for _ in range(4))
    never = {"preconditioner_upd_interval": _NEVER, "early_steps": 0}
    always = {"preconditioner_upd_interval": _NEVER, "curvature_upd_interval": 1, "early_steps": 0}
    with (
        _preconditioner(resting, rank, never) as at_rest,
        _preconditioner(working, rank, always) as at_work,
    ):
        _backward(resting)
        at_rest.step()  # the first step of all takes statistics, the next ones do not
        end_captured_step(at_work)
        steppers: dict[str, Callable[[], None]] = {
            "base": lambda: _backward(plain),
            "none": lambda: _backward(twin),
            "disarmed": lambda: _captured(resting, at_rest),
            "armed": lambda: _captured(working, at_work),
        }
        times = _take_turns(steppers, device, repetitions, steps)
    return [
        {
            "model": model,
            "variant": variant,
            "ms": _quartiles([1e3 * seconds for seconds in times[variant]]),
            "ratio": _quartiles(
                [a / b for a, b in zip(times[variant], times["base"], strict=True)]
            ),
        }
        for variant in VARIANTS
    ]


def _preconditioner(problem: Problem, rank: int, settings: dict[str, int]) -> Preconditioner:
    return Preconditioner(problem.model, KfacConfig(rank=rank, **settings), "inline")  # type: ignore[arg-type]


def _backward(problem: Problem) -> None:
    problem.model.zero_grad()
    problem.loss().backward()


def _captured(problem: Problem, precond: Preconditioner) -> None:
    """What lies between two applications: capture as `Preconditioner.step` begins and ends it."""
    begin_captured_step(precond)
    _backward(problem)
    end_captured_step(precond)


def _take_turns(
    steppers: dict[str, Callable[[], None]], device: str, repetitions: int, steps: int
) -> dict[str, list[float]]:
    """Seconds of each turn's fastest step, by name."""
    for step in steppers.values():
        for _ in range(_WARM_UP_STEPS):
            step()
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for repetition in range(repetitions):
        names = list(steppers)
        for name in names if repetition % 2 == 0 else reversed(names):
            steppers[name]()  # whoever was before has left the caches to itself
            spent = []
            for _ in range(steps):
                begin = work_time(device)
                steppers[name]()
                spent.append(work_time(device) - begin)
            times[name].append(min(spent))
    return times


def _quartiles(values: list[float]) -> dict[str, float | int]:
    return {
        "median": median(values),
        "lower": percentile(values, 0.25),
        "upper": percentile(values, 0.75),
        "n": len(values),
    }
