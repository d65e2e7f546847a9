"""The methods of `bench step` that need nothing beyond torch and distcurv.

A method is a function from a problem to a `Trainer`; a new one is one function and one line in
`METHODS`.  Learning rates are small: a step's time must not depend on whether training goes well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distcurv.bench.step_models import Problem
from distcurv.bench.step_phases import PhaseClock
from distcurv.config import KfacConfig
from distcurv.errors import ConfigError
from distcurv.optim.lowrank_soap import LowRankSOAP
from distcurv.train.pipeline import Pipeline
from distcurv.train.preconditioner import Preconditioner
from distcurv.train.provider import Workers

LR = 1e-4
BETAS = (0.9, 0.95)
_LINK_TIMEOUT_S = 600.0  # an idle worker is one that is stopped, and must not count as lost


@dataclass(frozen=True)
class Knobs:
    """What all methods are asked alike.

    Attributes:
        rank: r, where a method has one.
        interval: steps between two refreshes, where a method has them.
        capture_interval: steps between two statistics of distcurv's methods.
        workers: of distcurv's methods.
    """

    rank: int
    interval: int
    capture_interval: int
    workers: Workers


@dataclass
class Trainer:
    """One method at work on one problem.

    Attributes:
        clock: what its phases are charged to.
        train_step: one step, from forward to update; returns the loss.
        about: its settings, for the record.
        pipeline: of distcurv's methods; tells whether the coming step takes statistics.
        close: ends what it started.
    """

    clock: PhaseClock
    train_step: Callable[[], Tensor]
    about: str
    pipeline: Pipeline | None = None
    close: Callable[[], None] = lambda: None


Maker = Callable[[Problem, Knobs, PhaseClock], Trainer]


def over(
    problem: Problem, clock: PhaseClock, optimizers: list[torch.optim.Optimizer], about: str
) -> Trainer:
    """Forward, backward, then these optimizers."""

    def train_step() -> Tensor:
        clock.start("forward_backward")
        loss = problem.loss()
        loss.backward()
        clock.to("apply")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss

    return Trainer(clock, train_step, about)


def sgd(problem: Problem, knobs: Knobs, clock: PhaseClock) -> Trainer:
    """Plain SGD with momentum, to which everything is compared."""
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=LR, momentum=0.9)
    return over(problem, clock, [optimizer], "torch.optim.SGD, momentum 0.9")


def adamw(problem: Problem, knobs: Knobs, clock: PhaseClock) -> Trainer:
    """torch's AdamW as it comes."""
    optimizer = torch.optim.AdamW(problem.model.parameters(), lr=LR, betas=BETAS)
    return over(problem, clock, [optimizer], f"torch.optim.AdamW, betas {BETAS}")


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
    return over(problem, clock, optimizers, "torch.optim.Muon, 5 iterations; AdamW for vectors")


def lowrank_soap(problem: Problem, knobs: Knobs, clock: PhaseClock) -> Trainer:
    """distcurv's LowRankSOAP, gradient source."""
    optimizer = LowRankSOAP(
        problem.model,
        lr=LR,
        betas=BETAS,
        rank=knobs.rank,
        workers=knobs.workers,
        preconditioner_upd_interval=knobs.interval,
        curvature_upd_interval=knobs.capture_interval,
        early_steps=knobs.interval,
        link_timeout=_LINK_TIMEOUT_S,
    )
    pipeline = optimizer._open_pipeline()
    clock.watch(optimizer, "_add_statistics", "capture")
    clock.watch(optimizer, "_turn", "exchange")
    clock.watch(pipeline, "step", "exchange")
    trainer = over(
        problem,
        clock,
        [optimizer],
        f"distcurv.optim.LowRankSOAP, r = {knobs.rank}, interval {knobs.interval}, statistics "
        f"every {knobs.capture_interval} steps",
    )
    trainer.pipeline, trainer.close = pipeline, optimizer.close
    return trainer


def kfac(problem: Problem, knobs: Knobs, clock: PhaseClock) -> Trainer:
    """distcurv's low-rank K-FAC over SGD with momentum."""
    return _preconditioned(problem, knobs, clock, "lowrank")


def kfac_dense(problem: Problem, knobs: Knobs, clock: PhaseClock) -> Trainer:
    """distcurv's dense K-FAC over SGD with momentum."""
    return _preconditioned(problem, knobs, clock, "dense")


def _preconditioned(problem: Problem, knobs: Knobs, clock: PhaseClock, kind: str) -> Trainer:
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=LR, momentum=0.9)
    config = KfacConfig(
        kind=kind,
        rank=knobs.rank,
        preconditioner_upd_interval=knobs.interval,
        curvature_upd_interval=knobs.capture_interval,
        early_steps=0 if kind == "dense" else knobs.interval,
        damping=1e-2,
        damping_form="relative",
        graft=True,  # the update keeps the gradient's size, whatever the factors
        link_timeout=_LINK_TIMEOUT_S,
    )
    precond = Preconditioner(problem.model, config, workers=knobs.workers)
    pipeline, source = precond._pipeline, precond._source
    for method in ("_observe", "_deliver"):
        clock.watch(source.capture, method, "capture")
    for method in ("finish", "arm_if_due"):
        clock.watch(source, method, "capture")
    clock.watch(pipeline, "step", "exchange")

    def train_step() -> Tensor:
        clock.start("forward_backward")
        loss = problem.loss()
        loss.backward()
        clock.to("apply")
        precond.step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    rank = "" if kind == "dense" else f"r = {knobs.rank}, "
    about = (
        f"distcurv.Preconditioner, kind {kind}, {rank}interval {knobs.interval}, statistics every "
        f"{knobs.capture_interval} steps, grafted, over torch.optim.SGD with momentum 0.9"
    )
    return Trainer(clock, train_step, about, pipeline, precond.close)


METHODS: Mapping[str, Maker] = {
    "sgd": sgd,
    "adamw": adamw,
    "muon": muon,
    "lowrank-soap": lowrank_soap,
    "kfac": kfac,
    "kfac-dense": kfac_dense,
}
OURS = ("lowrank-soap", "kfac", "kfac-dense")
