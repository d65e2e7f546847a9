"""The methods of `bench step` that other packages bring: SOAP, Shampoo, ASDL's K-FAC.

The packages come with the extra ``bench``; each is imported only when its method is asked for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distcurv.bench.step_methods import BETAS, LR, Knobs, Maker, Trainer, over
from distcurv.bench.step_models import Problem
from distcurv.bench.step_phases import PhaseClock
from distcurv.errors import ConfigError


def soap(problem: Problem, knobs: Knobs, clock: PhaseClock) -> Trainer:
    """SOAP of pytorch-optimizer, its bases refreshed every ``interval`` steps."""
    from pytorch_optimizer import SOAP

    optimizer = SOAP(
        problem.model.parameters(),
        lr=LR,
        betas=BETAS,
        weight_decay=0.0,
        precondition_frequency=knobs.interval,
    )
    about = f"pytorch_optimizer.SOAP, interval {knobs.interval}"
    return over(problem, clock, [optimizer], about)


def shampoo(problem: Problem, knobs: Knobs, clock: PhaseClock) -> Trainer:
    """Shampoo of pytorch-optimizer, its roots computed every ``interval`` steps.

    Without momentum: its momentum is taken from preconditioned and added to plain gradients, which
    does not stay finite here."""
    from pytorch_optimizer import Shampoo

    optimizer = Shampoo(
        problem.model.parameters(),
        lr=LR,
        preconditioning_compute_steps=knobs.interval,
        matrix_eps=1e-4,
    )
    about = f"pytorch_optimizer.Shampoo, interval {knobs.interval}, no momentum"
    return over(problem, clock, [optimizer], about)


def asdl_kfac(problem: Problem, knobs: Knobs, clock: PhaseClock) -> Trainer:
    """K-FAC of ASDL: empirical Fisher, curvature and inverse every ``interval`` steps.

    Its curvature is captured inside its own forward and backward pass, so on those steps both are
    one phase.  Norm layers and embeddings are left to SGD, as distcurv leaves them.
    """
    _stub_nvtx()
    from asdl import FISHER_EMP, KfacGradientMaker, PreconditioningConfig

    ignored: list[type] = [nn.BatchNorm2d, nn.LayerNorm, nn.Embedding]
    maker = KfacGradientMaker(
        problem.model,
        PreconditioningConfig(
            data_size=len(problem.inputs),
            damping=1e-2,
            preconditioner_upd_interval=knobs.interval,
            curvature_upd_interval=knobs.interval,
            ema_decay=0.05,
            ignore_modules=ignored,
        ),
        fisher_type=FISHER_EMP,
    )
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=LR, momentum=0.9)
    clock.watch(maker, "update_preconditioner", "refresh")
    clock.watch(maker, "precondition", "apply")

    def train_step() -> Tensor:
        clock.start("forward_backward")
        dummy = maker.setup_model_call(problem.model, problem.inputs)
        if problem.targets.dim() == 1 and problem.inputs.dim() == 2:
            dummy = dummy.flatten(0, 1)  # tokens
        maker.setup_loss_call(problem.loss_function, dummy, problem.targets)
        maker.setup_logits_repr(dummy)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of its old-style backward hooks
            _, loss = maker.forward_and_backward()
        clock.to("apply")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    about = (
        f"ASDL KfacGradientMaker, empirical Fisher, curvature and inverse every {knobs.interval} "
        "steps, over torch.optim.SGD with momentum 0.9"
    )
    return Trainer(clock, train_step, about)


class _NoRange(contextlib.ContextDecorator):
    """Stands for ``torch.cuda.nvtx.range`` where torch has no CUDA."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        return

    def __enter__(self) -> None:
        return

    def __exit__(self, *exc: object) -> None:
        return


def _stub_nvtx() -> None:
    """ASDL marks ranges for a CUDA profiler at every turn, which a CPU build of torch refuses."""
    if torch.version.cuda is None:
        torch.cuda.nvtx.range = _NoRange  # type: ignore[assignment]


PEERS: Mapping[str, Maker] = {"soap": soap, "shampoo": shampoo, "asdl-kfac": asdl_kfac}

_PACKAGES = {
    "soap": ("pytorch_optimizer", "pytorch-optimizer"),
    "shampoo": ("pytorch_optimizer", "pytorch-optimizer"),
    "asdl-kfac": ("asdl", "asdfghjkl"),
}


def require_package(method: str) -> None:
    """Raise `ConfigError` when a peer's package is not installed."""
    module, package = _PACKAGES[method]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"--methods has {method}, which needs the package {package}: pip install "
            "'distcurv[bench]', or leave it out"
        )
