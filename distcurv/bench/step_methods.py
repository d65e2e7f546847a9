"""What a method of `bench step` is, and those that torch itself brings.

A method is a function from a problem to a `Trainer`; a new one is one function and one line in a
registry.  Learning rates are small: a step's time must not depend on whether training goes well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distcurv.bench.step_models import Problem
from distcurv.bench.step_phases import PhaseClock
from distcurv.errors import ConfigError
from distcurv.train.pipeline import Pipeline
from distcurv.train.provider import Workers

LR = 1e-4
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Knobs:
    """What all methods are asked alike.

    Attributes:
        rank: r, where a method has one.
        interval: steps between two refreshes, where a method has them.
        capture_interval: steps between two statistics of distcurv's methods, None for its default.
        workers: of distcurv's methods.
    """

    rank: int
    interval: int
    capture_interval: int | None
    workers: Workers


@dataclass
class Trainer:
    """One method at work on one problem.

    Attributes:
        problem: what it trains.
        clock: what its phases are charged to.
        train_step: one step, from forward to update; returns the loss.
        about: its settings, for the record.
        period: steps after which what it does repeats.
        roots: the objects in which it keeps its state.
        pipeline: of distcurv's methods; tells whether the coming step takes statistics.
        apply_updates: its phase apply also updates momentum and weights.
        close: ends what it started.
    """

    problem: Problem
    clock: PhaseClock
    train_step: Callable[[], Tensor]
    about: str
    period: int
    roots: Sequence[object] = ()
    pipeline: Pipeline | None = None
    apply_updates: bool = False
    close: Callable[[], None] = lambda: None


Maker = Callable[[Problem, Knobs, PhaseClock], Trainer]


def over(
    problem: Problem,
    clock: PhaseClock,
    optimizers: Sequence[torch.optim.Optimizer],
    about: str,
    period: int,
    precondition: Callable[[], None] | None = None,
) -> Trainer:
    """Forward, backward, ``precondition`` (as phase apply), then these optimizers."""

    def train_step() -> Tensor:
        clock.start("forward_backward")
        loss = problem.loss()
        loss.backward()
        if precondition is not None:
            clock.to("apply")
            precondition()
        clock.to("optimizer")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss

    return Trainer(problem, clock, train_step, about, period, list(optimizers))


def momentum_sgd(parameters: Sequence[Tensor]) -> torch.optim.SGD:
    """Plain SGD with momentum: the baseline, and what K-FAC methods run over."""
    return torch.optim.SGD(parameters, lr=LR, momentum=0.9)


def sgd(problem: Problem, knobs: Knobs, clock: PhaseClock) -> Trainer:
    """Plain SGD with momentum, to which everything is compared."""
    optimizer = momentum_sgd(list(problem.model.parameters()))
    return over(problem, clock, [optimizer], "torch.optim.SGD, momentum 0.9", knobs.interval)


def adamw(problem: Problem, knobs: Knobs, clock: PhaseClock) -> Trainer:
    """torch's AdamW as it comes."""
    optimizer = torch.optim.AdamW(problem.model.parameters(), lr=LR, betas=BETAS)
    return over(problem, clock, [optimizer], f"torch.optim.AdamW, betas {BETAS}", knobs.interval)


def muon(problem: Problem, knobs: Knobs, clock: PhaseClock) -> Trainer:
    """torch's Muon on the matrices, AdamW on the rest.

    Raises:
        ConfigError: the model has weights of more than two dimensions, which it does not take.
    """
    parameters = list(problem.model.parameters())
    if any(p.dim() > 2 for p in parameters):
        raise ConfigError(
            "--methods has muon: torch's Muon takes matrices only, this model has convolutions; "
            "leave it out"
        )
    matrices = [p for p in parameters if p.dim() == 2]
    rest = [p for p in parameters if p.dim() != 2]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.Muon(matrices, lr=LR)]
    optimizers.append(torch.optim.AdamW(rest, lr=LR, betas=BETAS))
    about = "torch.optim.Muon, 5 iterations; AdamW for vectors"
    return over(problem, clock, optimizers, about, knobs.interval)


TORCH: Mapping[str, Maker] = {"sgd": sgd, "adamw": adamw, "muon": muon}
