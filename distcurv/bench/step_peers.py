"""The methods of `bench step` that other packages bring, and where those packages come from.

Each is imported only when its method is asked for.  Most come with the extra ``bench``; the rest
are used where the user has them on the path.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import NamedTuple

from distcurv.bench.step_methods import BETAS, LR, Knobs, Maker, Trainer, momentum_sgd, over
from distcurv.bench.step_models import Problem
from distcurv.bench.step_peers_kfac import asdl_kfac, kfac_pytorch, low_rank_asdl
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
    return over(problem, clock, [optimizer], about, knobs.interval)


def shampoo(problem: Problem, knobs: Knobs, clock: PhaseClock) -> Trainer:
    """Distributed Shampoo as pytorch-optimizer has it, grafted on RMSProp, as in `bench converge`.

    (Its plain Shampoo takes roots by an SVD, which does not converge on the autoencoder.)"""
    from pytorch_optimizer import ScalableShampoo
    from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting

    optimizer = ScalableShampoo(
        problem.model.parameters(),
        lr=LR,
        betas=BETAS,
        moving_average_for_momentum=True,
        start_preconditioning_step=knobs.interval,
        preconditioning_compute_steps=knobs.interval,
        graft_type=LayerWiseGrafting.RMSPROP,
    )
    about = (
        f"pytorch_optimizer.ScalableShampoo, betas {BETAS}, interval {knobs.interval}, blocks of "
        "512, grafted on RMSProp"
    )
    return over(problem, clock, [optimizer], about, knobs.interval)


def singd(problem: Problem, knobs: Knobs, clock: PhaseClock) -> Trainer:
    """SINGD with dense structures on the layers that it knows, SGD with momentum on the rest.

    Its curvature is captured by hooks inside forward and backward, every ``interval`` steps."""
    from singd.optim.optimizer import SINGD

    optimizer = SINGD(
        problem.model,
        lr=LR,
        damping=1e-2,
        T=knobs.interval,
        loss_average="batch+sequence" if problem.sequences else "batch",
        normalize_lr_cov=True,  # so that the factors stay finite from the first step on
        warn_unsupported=False,
    )
    taken = {id(p) for group in optimizer.param_groups for p in group["params"]}
    rest = [p for p in problem.model.parameters() if id(p) not in taken]
    optimizers = [optimizer, momentum_sgd(rest)] if rest else [optimizer]
    about = f"singd.SINGD, dense structures, T = {knobs.interval}; SGD with momentum for the rest"
    return over(problem, clock, optimizers, about, knobs.interval)


PEERS: Mapping[str, Maker] = {
    "soap": soap,
    "shampoo": shampoo,
    "singd": singd,
    "asdl-kfac": asdl_kfac,
    "kfac-pytorch": kfac_pytorch,
    "low-rank-asdl": low_rank_asdl,
}


class _Source(NamedTuple):
    """The module that a method needs, and how the user gets it."""

    module: str
    how: str


_EXTRA = "pip install 'distcurv[bench]'"
_SOURCES = {
    "soap": _Source("pytorch_optimizer", f"{_EXTRA} (the package is called pytorch-optimizer)"),
    "shampoo": _Source("pytorch_optimizer", f"{_EXTRA} (the package is called pytorch-optimizer)"),
    "singd": _Source("singd.optim.optimizer", _EXTRA),
    # Two other packages of PyPI are imported as asdl and kfac as well.
    "asdl-kfac": _Source("asdl.precondition", f"{_EXTRA} (the package is called asdfghjkl)"),
    "kfac-pytorch": _Source(
        "kfac.preconditioner",
        "pip install git+https://github.com/gpauloski/kfac-pytorch",
    ),
    "low-rank-asdl": _Source(
        "low_rank_asdl",
        "put a checkout of github.com/dubachti/low_rank_asdl, in a folder of that name, on "
        "PYTHONPATH",
    ),
}


def require_package(method: str) -> None:
    """Raise `ConfigError` when what a peer is made of cannot be imported here."""
    source = _SOURCES[method]
    refusal = f"--methods has {method}, which needs {source.module}: {source.how}, or leave it out"
    try:
        importlib.import_module(source.module)
    except (ImportError, SyntaxError) as error:  # an installed package may be broken as well
        raise ConfigError(f"{refusal} ({error})") from error
