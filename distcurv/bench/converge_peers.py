"""The methods of `bench converge` that other packages bring: SOAP, Shampoo, ASDL's K-FAC.

Each package comes with the extra ``bench`` and is imported only when its method is asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distcurv.bench.converge_methods import (
    BETAS,
    INTERVAL,
    MOMENTUM,
    OWN,
    Maker,
    Setup,
    Training,
    over,
)
from distcurv.bench.converge_tasks import Batch
from distcurv.bench.step_peers_kfac import stub_nvtx

_ASDL_DAMPING = 1e-2
_ASDL_EMA = 0.05
_ASDL_CLIP = 1.0  # of the preconditioned gradient's norm


def soap(setup: Setup) -> Training:
    """SOAP of pytorch-optimizer, full bases."""
    from pytorch_optimizer import SOAP

    optimizer = SOAP(
        setup.model.parameters(),
        lr=setup.lr,
        betas=BETAS,
        weight_decay=0.0,
        precondition_frequency=INTERVAL,
    )
    return over(setup, [optimizer], f"pytorch_optimizer.SOAP, betas {BETAS}, interval {INTERVAL}")


def shampoo(setup: Setup) -> Training:
    """Distributed Shampoo as pytorch-optimizer has it, grafted on RMSProp.

    Its plain Shampoo (no graft, no momentum) reaches 3.9 on digits where this one reaches 0.17."""
    from pytorch_optimizer import ScalableShampoo
    from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting

    optimizer = ScalableShampoo(
        setup.model.parameters(),
        lr=setup.lr,
        betas=BETAS,
        moving_average_for_momentum=True,
        start_preconditioning_step=INTERVAL,
        preconditioning_compute_steps=INTERVAL,
        graft_type=LayerWiseGrafting.RMSPROP,
    )
    about = (
        f"pytorch_optimizer.ScalableShampoo, betas {BETAS}, interval {INTERVAL}, blocks of 512, "
        "grafted on RMSProp"
    )
    return over(setup, [optimizer], about)


def asdl_kfac(setup: Setup) -> Training:
    """K-FAC of ASDL over SGD with momentum: empirical Fisher.

    ASDL sums what it captures, so ``scale`` makes the factors the means that damping is meant for.
    The preconditioned gradient is clipped: without it digits ended at 0.55 at best (with larger
    damping) or diverged, with it at 0.36.
    Norm layers and embeddings are left to SGD (distcurv's own K-FAC has them).  It does its own
    thing in a process group, so it is not trained data-parallel.
    """
    stub_nvtx()
    from asdl import FISHER_EMP, KfacGradientMaker, PreconditioningConfig

    task = setup.task
    ignored: list[type] = [nn.LayerNorm, nn.Embedding]
    maker = KfacGradientMaker(
        setup.model,
        PreconditioningConfig(
            data_size=task.rows,
            damping=_ASDL_DAMPING,
            preconditioner_upd_interval=INTERVAL,
            curvature_upd_interval=INTERVAL,
            ema_decay=_ASDL_EMA,
            ignore_modules=ignored,
        ),
        fisher_type=FISHER_EMP,
        scale=1.0 / task.rows,
    )
    optimizer = torch.optim.SGD(setup.model.parameters(), lr=setup.lr, momentum=MOMENTUM)

    def step(batch: Batch) -> Tensor:
        inputs, targets = batch
        dummy = maker.setup_model_call(setup.model, inputs)
        if task.rows_per_sample > 1:
            dummy, targets = dummy.flatten(0, 1), targets.flatten()
        maker.setup_loss_call(task.loss, dummy, targets)
        maker.setup_logits_repr(dummy)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of its old-style backward hooks
            _, loss = maker.forward_and_backward()
        nn.utils.clip_grad_norm_(setup.model.parameters(), _ASDL_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    about = (
        f"ASDL KfacGradientMaker, empirical Fisher, curvature and inverse every {INTERVAL} steps, "
        f"damping {_ASDL_DAMPING}, EMA {_ASDL_EMA}, update clipped to the norm {_ASDL_CLIP}, over "
        f"torch.optim.SGD with momentum {MOMENTUM}"
    )
    return Training(step, about)


PEERS: Mapping[str, Maker] = {"soap": soap, "shampoo": shampoo, "asdl-kfac": asdl_kfac}
MAKERS: Mapping[str, Maker] = {**OWN, **PEERS}
