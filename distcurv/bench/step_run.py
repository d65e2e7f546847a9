"""Runs the methods of `bench step` in turn and measures their steps.

All of them live in one process and take turns in each repetition, first to last and last to
first, so that whatever disturbs the machine disturbs them alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from distcurv.bench.clock import synchronise
from distcurv.bench.step_crew import Member, Turn
from distcurv.bench.step_peers import PEERS
from distcurv.bench.step_phases import Mark, seconds
from distcurv.bench.step_rate import PlainProducts
from distcurv.errors import StateError


def warm_up_steps(interval: int) -> int:
    """Past the early phase and the first install that a worker made."""
    return 3 * interval + 3


def warm_up(member: Member, interval: int) -> None:
    """The steps before any that count."""
    run_steps(member, warm_up_steps(interval))
    member.settle()


def attempt(member: Member, work: Callable[[], object]) -> None:
    """Do ``work`` with a method.  Where another package's fails, the others go on without it, and
    `Member.fault` says why; our own methods and torch's must not fail."""
    if member.variant.method not in PEERS:
        work()
        return
    try:
        work()
    except (ArithmeticError, RuntimeError, TypeError, ValueError, StateError) as error:
        member.fault = " ".join(f"{type(error).__name__}: {error}".split())


def run_steps(member: Member, steps: int, after_each: Callable[[], None] = lambda: None) -> Turn:
    """So many steps of one method, and what was measured of them.

    Args:
        after_each: called between two steps, untimed.

    Raises:
        StateError: its loss is not finite any more; such a step's time means nothing."""
    trainer = member.trainer
    pipeline = trainer.pipeline
    marks: list[Sequence[Mark]] = []
    captured: list[bool] = []
    places: list[int] = []
    loss = None
    used = 0.0
    for _ in range(steps):
        captured.append(pipeline is not None and pipeline.capture_due)
        places.append(member.steps % trainer.period)
        with member.alone():
            processor = time.process_time()
            loss = trainer.train_step()
            marks.append(trainer.clock.stop())
            used += time.process_time() - processor
        loss = loss.detach()  # its graph is not the method's to keep
        member.steps += 1
        after_each()
    if loss is not None and not math.isfinite(float(loss)):
        raise StateError(
            f"the loss of {member.variant.method} is not finite: its times mean nothing"
        )
    synchronise(member.device)
    phases = [{name: 1e3 * s for name, s in seconds(step).items()} for step in marks]
    whole = [sum(spent.values()) for spent in phases]
    return Turn(whole, phases, captured, places, 1e3 * used / max(1, steps), None)


def steps_of_a_turn(member: Member, steps: int) -> int:
    """At least ``steps``, and whole periods, so that everything occurs in its due share."""
    return -(-steps // member.trainer.period) * member.trainer.period


def take_turns(
    crew: Sequence[Member], repetitions: int, steps: int, at: Callable[[str], None]
) -> None:
    """Every method once in each repetition, forwards and backwards by turns."""
    products = {
        id(member): PlainProducts(member.trainer.pipeline.table.specs, member.device)
        for member in crew
        if member.trainer.pipeline is not None
    }
    for repetition in range(repetitions):
        for member in crew if repetition % 2 == 0 else reversed(crew):
            at(member.variant.method)
            if member.fault is not None:
                continue

            def turn(member: Member = member) -> None:
                member.turns.append(run_steps(member, steps_of_a_turn(member, steps)))

            attempt(member, turn)
            member.settle()
            if id(member) in products:
                member.turns[-1].products_ms = 1e3 * products[id(member)].seconds()
