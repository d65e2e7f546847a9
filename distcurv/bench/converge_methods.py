"""The optimizers of `bench converge` and `bench staleness`, ready to train on changing batches.

Only the learning rate differs from training to training; everything else is one setting for all
tasks, written here.  A method is a function and a line in `MAKERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distcurv.bench.converge_tasks import Batch, ConvergeTask
from distcurv.config import KfacConfig, SoapConfig
from distcurv.optim.lowrank_soap import LowRankSOAP
from distcurv.train.preconditioner import Preconditioner
from distcurv.train.provider import Workers

BETAS = (0.9, 0.95)
INTERVAL = 10  # steps between two refreshes, of every method that has them
MOMENTUM = 0.9  # of SGD, alone and under K-FAC
KFAC_RANK = 32
KFAC_DAMPING = 1e-2  # relative to each side's mean eigenvalue


@dataclass(frozen=True)
class Setup:
    """What a training of one method is made of.

    Attributes:
        task: gives the loss.
        model: whose parameters are optimised.
        forward: the model, or what wraps it for data-parallel training.
        lr: learning rate.
        seed: of random bases, where a method has them.
        workers: of distcurv's methods.
        install_delay: None for real asynchrony; else the deterministic mode of distcurv's methods.
        interval: steps between two installs of distcurv's methods; None: what they have by default.
    """

    task: ConvergeTask
    model: nn.Module
    forward: nn.Module
    lr: float
    seed: int
    workers: Workers = "inline"
    install_delay: int | None = None
    interval: int | None = None

    def loss(self, batch: Batch) -> Tensor:
        """Of a batch, with its graph."""
        loss: Tensor = self.task.loss(self.forward(batch[0]), batch[1])
        return loss


@dataclass
class Training:
    """One method at work: ``step`` trains on a batch and returns its loss before the update."""

    step: Callable[[Batch], Tensor]
    about: str
    service: LowRankSOAP | Preconditioner | None = None

    def close(self) -> None:
        """End what the method started."""
        if self.service is not None:
            self.service.close()


Maker = Callable[[Setup], Training]


def over(setup: Setup, optimizers: list[torch.optim.Optimizer], about: str) -> Training:
    """Forward, backward, then these optimizers."""

    def step(batch: Batch) -> Tensor:
        loss = setup.loss(batch)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss

    return Training(step, about)


def sgd(setup: Setup) -> Training:
    """SGD with momentum."""
    optimizer = torch.optim.SGD(setup.model.parameters(), lr=setup.lr, momentum=MOMENTUM)
    return over(setup, [optimizer], f"torch.optim.SGD, momentum {MOMENTUM}")


def adamw(setup: Setup) -> Training:
    """AdamW without weight decay."""
    optimizer = torch.optim.AdamW(
        setup.model.parameters(), lr=setup.lr, betas=BETAS, weight_decay=0.0
    )
    return over(setup, [optimizer], f"torch.optim.AdamW, betas {BETAS}, no weight decay")


def muon(setup: Setup) -> Training:
    """torch's Muon on the hidden matrices, AdamW at the same learning rate on the rest."""
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in setup.model.named_parameters():
        use = parameter.dim() == 2 and name not in setup.task.not_hidden
        (hidden if use else rest).append(parameter)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            hidden,
            lr=setup.lr,
            weight_decay=0.0,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(rest, lr=setup.lr, betas=BETAS, weight_decay=0.0),
    ]
    about = (
        "torch.optim.Muon, momentum 0.95, match_rms_adamw, no weight decay; AdamW at the same "
        "learning rate for vectors, embeddings and the language models' head"
    )
    return over(setup, optimizers, about)


def lowrank_soap(setup: Setup) -> Training:
    """distcurv's LowRankSOAP at its default settings, but for the interval."""
    interval = SoapConfig().preconditioner_upd_interval
    optimizer = LowRankSOAP(
        setup.model,
        lr=setup.lr,
        workers=setup.workers,
        seed=setup.seed,
        install_delay=setup.install_delay,
        preconditioner_upd_interval=interval if setup.interval is None else setup.interval,
    )
    config = optimizer.config
    training = over(
        setup,
        [optimizer],
        f"distcurv.optim.LowRankSOAP, defaults but for what is said: r = {config.rank}, interval "
        f"{config.resolved_preconditioner_upd_interval}, statistics every "
        f"{config.resolved_curvature_upd_interval} steps, source {config.source}",
    )
    training.service = optimizer
    return training


def kfac(setup: Setup) -> Training:
    """distcurv's low-rank K-FAC, grafted, over SGD with momentum: no eigenvalue correction."""
    optimizer = torch.optim.SGD(setup.model.parameters(), lr=setup.lr, momentum=MOMENTUM)
    config = KfacConfig(
        rank=KFAC_RANK,
        preconditioner_upd_interval=setup.interval or INTERVAL,
        damping=KFAC_DAMPING,
        damping_form="relative",
        graft=True,
        install_delay=setup.install_delay,
        seed=setup.seed,
    )
    precond = Preconditioner(setup.model, config, workers=setup.workers)

    def step(batch: Batch) -> Tensor:
        loss = setup.loss(batch)
        loss.backward()
        precond.step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    about = (
        f"distcurv.Preconditioner, low rank r = {KFAC_RANK}, interval "
        f"{config.resolved_preconditioner_upd_interval}, relative damping {KFAC_DAMPING}, grafted, "
        f"over torch.optim.SGD with momentum {MOMENTUM}"
    )
    return Training(step, about, precond)


OWN: Mapping[str, Maker] = {
    "sgd": sgd,
    "adamw": adamw,
    "muon": muon,
    "lowrank-soap": lowrank_soap,
    "kfac": kfac,
}
SERVED = ("lowrank-soap", "kfac")
