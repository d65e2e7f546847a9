"""distcurv's own methods of `bench step`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from distcurv.bench.step_hooks import watch_preconditioner, watch_soap
from distcurv.bench.step_methods import BETAS, LR, Knobs, Maker, Trainer, momentum_sgd, over
from distcurv.bench.step_models import Problem
from distcurv.bench.step_phases import PhaseClock
from distcurv.config import KfacConfig
from distcurv.optim.lowrank_soap import LowRankSOAP
from distcurv.train.pipeline import Pipeline
from distcurv.train.preconditioner import Preconditioner

_LINK_TIMEOUT_S = 600.0  # an idle worker is one that is stopped, and must not count as lost


def lowrank_soap(problem: Problem, knobs: Knobs, clock: PhaseClock) -> Trainer:
    """LowRankSOAP at its default settings."""
    optimizer = LowRankSOAP(
        problem.model,
        lr=LR,
        betas=BETAS,
        rank=knobs.rank,
        workers=knobs.workers,
        early_steps=knobs.interval,
        **_service(knobs),
    )
    pipeline = watch_soap(clock, optimizer)
    about = f"distcurv.optim.LowRankSOAP, source {optimizer.config.source}, {_rhythm(pipeline)}"
    trainer = over(problem, clock, [optimizer], about, _period(pipeline))
    trainer.pipeline, trainer.close, trainer.apply_updates = pipeline, optimizer.close, True
    return trainer


def kfac(problem: Problem, knobs: Knobs, clock: PhaseClock) -> Trainer:
    """Low-rank K-FAC over SGD with momentum."""
    return _preconditioned(problem, knobs, clock, "lowrank")


def kfac_dense(problem: Problem, knobs: Knobs, clock: PhaseClock) -> Trainer:
    """Dense K-FAC over SGD with momentum."""
    return _preconditioned(problem, knobs, clock, "dense")


def _preconditioned(problem: Problem, knobs: Knobs, clock: PhaseClock, kind: str) -> Trainer:
    config = KfacConfig(
        kind=kind,
        rank=knobs.rank,
        early_steps=0 if kind == "dense" else knobs.interval,
        damping=1e-2,
        damping_form="relative",
        graft=True,  # the update keeps the gradient's size, whatever the factors
        **_service(knobs),
    )
    optimizer = momentum_sgd(list(problem.model.parameters()))
    precond = Preconditioner(problem.model, config, workers=knobs.workers)
    pipeline = watch_preconditioner(clock, precond)
    about = (
        f"distcurv.Preconditioner, kind {kind}, {_rhythm(pipeline)}, grafted, over "
        "torch.optim.SGD with momentum 0.9"
    )
    period = _period(pipeline)
    trainer = over(problem, clock, [optimizer], about, period, lambda: precond.step())
    trainer.pipeline, trainer.close = pipeline, precond.close
    trainer.roots = [optimizer, precond]
    return trainer


def _service(knobs: Knobs) -> dict[str, Any]:
    """Settings of `ServiceConfig`; what is not asked for stays at its default."""
    settings: dict[str, Any] = {
        "preconditioner_upd_interval": knobs.interval,
        "link_timeout": _LINK_TIMEOUT_S,
    }
    if knobs.capture_interval is not None:
        settings["curvature_upd_interval"] = knobs.capture_interval
    return settings


def _period(pipeline: Pipeline) -> int:
    config = pipeline.config
    return math.lcm(
        config.resolved_preconditioner_upd_interval, config.resolved_curvature_upd_interval
    )


def _rhythm(pipeline: Pipeline) -> str:
    config = pipeline.config
    rank = "" if pipeline.table.specs[0].kind == "dense" else f"r = {config.rank}, "
    return (
        f"{rank}interval {config.resolved_preconditioner_upd_interval}, statistics every "
        f"{config.resolved_curvature_upd_interval} steps"
    )


DISTCURV: Mapping[str, Maker] = {
    "lowrank-soap": lowrank_soap,
    "kfac": kfac,
    "kfac-dense": kfac_dense,
}
