"""The K-FAC methods of `bench step` that other packages bring: ASDL, low-rank ASDL, kfac-pytorch.

They capture inside the forward and backward pass, so on statistics steps both are one phase.  Norm
layers and embeddings are left to SGD; distcurv's own K-FAC has them as blocks.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from distcurv.bench.step_methods import LR, Knobs, Trainer, momentum_sgd, over
from distcurv.bench.step_models import Problem
from distcurv.bench.step_phases import PhaseClock

_DAMPING = 1e-2
_IGNORED: list[type] = [nn.BatchNorm2d, nn.LayerNorm, nn.Embedding]


def asdl_kfac(problem: Problem, knobs: Knobs, clock: PhaseClock) -> Trainer:
    """K-FAC of ASDL: empirical Fisher, curvature and inverse every ``interval`` steps."""
    stub_nvtx()
    from asdl import FISHER_EMP, KfacGradientMaker, PreconditioningConfig

    maker = KfacGradientMaker(
        problem.model,
        PreconditioningConfig(
            data_size=len(problem.targets),
            damping=_DAMPING,
            preconditioner_upd_interval=knobs.interval,
            curvature_upd_interval=knobs.interval,
            ema_decay=0.05,
            ignore_modules=_IGNORED,
        ),
        fisher_type=FISHER_EMP,
    )
    optimizer = momentum_sgd(list(problem.model.parameters()))
    clock.watch(maker, "update_preconditioner", "refresh")
    clock.watch(maker, "precondition", "apply")

    def train_step() -> Tensor:
        clock.start("forward_backward")
        dummy = maker.setup_model_call(problem.model, problem.inputs)
        if problem.sequences:
            dummy = dummy.flatten(0, 1)
        maker.setup_loss_call(problem.loss_function, dummy, problem.targets)
        maker.setup_logits_repr(dummy)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of its old-style backward hooks
            _, loss = maker.forward_and_backward()
        clock.to("optimizer")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    about = (
        f"ASDL KfacGradientMaker, empirical Fisher, curvature and inverse every {knobs.interval} "
        "steps, over torch.optim.SGD with momentum 0.9"
    )
    return Trainer(problem, clock, train_step, about, knobs.interval, [optimizer, maker])


def low_rank_asdl(problem: Problem, knobs: Knobs, clock: PhaseClock) -> Trainer:
    """Low-rank K-FAC of low-rank ASDL: empirical Fisher, ten power iterations a direction (its
    default), curvature and inverse every ``interval`` steps.

    On CPU it runs with the ranges of the CUDA profiler stubbed."""
    stub_nvtx()
    import low_rank_asdl as asdl

    fisher = asdl.NaturalGradient(
        problem.model,
        fisher_type=asdl.FISHER_EMP,
        fisher_shape=asdl.SHAPE_KRON_LR,
        damping=_DAMPING,
        rank=knobs.rank,
        ignore_modules=_IGNORED,
    )
    optimizer = momentum_sgd(list(problem.model.parameters()))
    clock.watch(fisher, "update_inv", "refresh")
    samples = len(problem.inputs)
    done = 0

    def train_step() -> Tensor:
        nonlocal done
        clock.start("forward_backward")
        if done % knobs.interval:
            loss = problem.loss()
            loss.backward()
        else:
            fisher.fisher_manager.zero_fisher()
            with asdl.no_centered_cov(
                problem.model,
                fisher.fisher_shape,
                ignore_modules=_IGNORED,
                rank=fisher.rank,
                max_itr=fisher.max_itr,
            ) as context:
                loss = problem.loss()
                loss.backward()
                fisher.save_curvature(context, scale=1.0 / samples)
            fisher.update_inv()
        done += 1
        clock.to("apply")
        fisher.precondition()
        clock.to("optimizer")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    about = (
        f"low_rank_asdl.NaturalGradient, kron_lr, r = {knobs.rank}, {fisher.max_itr} power "
        f"iterations, empirical Fisher, curvature and inverse every {knobs.interval} steps, over "
        "torch.optim.SGD with momentum 0.9"
    )
    return Trainer(problem, clock, train_step, about, knobs.interval, [optimizer, fisher])


def kfac_pytorch(problem: Problem, knobs: Knobs, clock: PhaseClock) -> Trainer:
    """K-FAC of kfac-pytorch, eigendecompositions: factors every ``interval`` steps, inverses every
    ten of those, as its authors run it (10 and 100)."""
    from kfac.preconditioner import KFACPreconditioner

    period = 10 * knobs.interval
    precond = KFACPreconditioner(
        problem.model,
        factor_update_steps=knobs.interval,
        inv_update_steps=period,
        damping=_DAMPING,
        lr=LR,
    )
    for _, layer in precond._layers.values():
        for method in ("compute_a_inv", "compute_g_inv"):
            clock.watch(layer, method, "refresh")
    optimizer = momentum_sgd(list(problem.model.parameters()))
    about = (
        f"kfac.preconditioner.KFACPreconditioner, eigen, factors every {knobs.interval} and "
        f"inverses every {period} steps, over torch.optim.SGD with momentum 0.9"
    )
    trainer = over(problem, clock, [optimizer], about, period, precond.step)
    trainer.roots = [optimizer, precond]
    return trainer


def _no_mark(*args: object) -> int:
    """Stands for ``range_push`` and ``range_pop``, which a range consists of."""
    return 0


def stub_nvtx() -> None:
    """ASDL marks ranges for a CUDA profiler at every turn, which a CPU build of torch refuses."""
    if torch.version.cuda is None:
        torch.cuda.nvtx.range_push = _no_mark
        torch.cuda.nvtx.range_pop = _no_mark
