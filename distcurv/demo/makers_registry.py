"""The gradient makers that ``distcurv demo --makers`` trains with, and their settings there.

Every maker that gives a gradient is followed by the same SGD with momentum as the baseline without
one, so that the maker is all that differs; SOAP and CurveBall have a momentum of their own.
Learning rates and dampings are the best of short searches over factors of about two, seed 0, 200
steps of the autoencoder: they say nothing of other tasks.

A new maker is one `Choice` in `CHOICES`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from distcurv import makers
from distcurv.demo.tasks import TASKS
from distcurv.demo.train import BETAS
from distcurv.errors import ConfigError
from distcurv.makers import GradientMaker, PreconditionedGradientMaker, PreconditioningConfig
from distcurv.train.provider import Workers

TASK = "autoencoder"
BASELINES = ("sgd", "adamw")
DEFAULT_RANK = 16
MOMENTUM = 0.9
# Given with workers alone. In the beginning curvature grows by orders of magnitude, and full
# inverses and roots of what it was some steps before hold the training up.
EARLY_STEPS = 60


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A maker with all that a training needs.

    Attributes:
        lr: learning rate.
        maker: None for the gradient itself.
        optimizer: ``SGD`` or ``AdamW``.
        momentum: SGD's.
        settings: of the `PreconditioningConfig`.
        options: further arguments of the maker.
        low_rank: whether ``--rank`` is its rank.
    """

    lr: float
    maker: type[PreconditionedGradientMaker] | None = None
    optimizer: str = "SGD"
    momentum: float = MOMENTUM
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    low_rank: bool = False

    @property
    def served(self) -> bool:
        """Whether workers may do the expensive part."""
        return self.maker is not None and self.maker.served

    @property
    def maker_name(self) -> str:
        """The class."""
        return (self.maker or GradientMaker).__name__

    def make(self, model: nn.Module, *, rank: int, workers: Workers, seed: int) -> GradientMaker:
        """The maker of a model; ``rank`` and ``workers`` count where it has such."""
        if self.maker is None:
            return GradientMaker(model)
        config = PreconditioningConfig(
            **self.settings,
            lr=self.lr if "kl_clip" in self.settings else None,
            rank=rank if self.low_rank else None,
            workers=workers if self.served else 0,
            early_steps=EARLY_STEPS if self.served and workers else None,
            seed=seed,
        )
        return self.maker(model, config, **self.options)

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """What takes the step."""
        if self.optimizer == "AdamW":
            return torch.optim.AdamW(parameters, lr=self.lr, betas=BETAS, weight_decay=0.0)
        return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum)


# Updates at every step of the beginning, where the curvature changes fast, then at every fifth.
_TIMES: dict[str, Any] = {"preconditioner_upd_interval": 5, "preconditioner_warmup_steps": 10}
_AVERAGED = {**_TIMES, "ema_decay": 0.05}
# The pixels' targets lie between 0 and 1 and are no draws of a class: the data's targets.
_EMPIRICAL = {"fisher_type": makers.FISHER_EMP}

# Relative damping: the deep layers' factors are smaller by orders of magnitude.
_FISHER = {
    **_AVERAGED,
    "preconditioner_upd_interval": 10,
    "damping": 1.0,
    "damping_form": "relative",
    "kl_clip": 3e-3,
}
_SOAP: dict[str, Any] = {
    "lr": TASKS[TASK].distcurv_lr,
    "maker": makers.SoapGradientMaker,
    "momentum": 0.0,
    "settings": _TIMES,
    "options": {"betas": BETAS},
}
_SHAMPOO: dict[str, Any] = {
    "lr": 1e-3,
    "maker": makers.ShampooGradientMaker,
    "settings": {**_AVERAGED, "damping": 1e-6},
    "options": {"grafting": "rmsprop"},
}
_KFAC: dict[str, Any] = {
    "lr": 0.03,
    "maker": makers.KfacGradientMaker,
    "settings": {**_FISHER, "preconditioner_upd_interval": 5, "damping": 3.0},
    "options": _EMPIRICAL,
}

CHOICES: dict[str, Choice] = {
    "sgd": Choice(lr=0.05),
    "adamw": Choice(lr=TASKS[TASK].baseline_lr, optimizer="AdamW"),
    "kfac": Choice(**_KFAC),
    "kfac-lowrank": Choice(**_KFAC, low_rank=True),
    "ekfac": Choice(lr=0.03, maker=makers.EkfacGradientMaker, settings=_FISHER, options=_EMPIRICAL),
    "unit-wise": Choice(
        lr=0.03,
        maker=makers.UnitWiseNaturalGradientMaker,
        settings={**_FISHER, "damping": 0.3},
        options=_EMPIRICAL,
    ),
    "diag": Choice(
        lr=0.03,
        maker=makers.DiagNaturalGradientMaker,
        settings={**_TIMES, "ema_decay": 0.05, "damping": 1.0},
        options=_EMPIRICAL,
    ),
    "shampoo": Choice(**_SHAMPOO),
    "shampoo-lowrank": Choice(**_SHAMPOO, low_rank=True),
    "soap": Choice(**_SOAP),
    "soap-lowrank": Choice(**_SOAP, low_rank=True),
    "kron-bfgs": Choice(
        lr=0.1, maker=makers.KronBfgsGradientMaker, settings={**_AVERAGED, "damping": 0.3}
    ),
    "kron-psgd": Choice(
        lr=0.03,
        maker=makers.KronPsgdGradientMaker,
        settings={"damping": 0.01},
        options={"precond_lr": 0.1},
    ),
    "seng": Choice(lr=0.01, maker=makers.SengGradientMaker, settings={**_TIMES, "damping": 0.1}),
    "curveball": Choice(
        lr=1.0, maker=makers.CurveBallGradientMaker, momentum=0.0, settings={"damping": 1.0}
    ),
}

_SQUARE = "its matrix over all parameters has 38,026 x 38,026 numbers, 5.8 GB"
REFUSED: dict[str, str] = {
    "full": _SQUARE,
    "newton": _SQUARE,
    "smw": "it holds the gradients of 256 samples, anew at every step: minutes",
    "psgd": f"{_SQUARE} (kron-psgd has one for each side of a layer)",
    "layer-wise": "its matrices have up to 8,320 x 8,320 numbers, inverted at each update: minutes",
}


def parse_names(text: str) -> tuple[str, ...]:
    """The names of ``--makers``, after the baselines, each once.

    Raises:
        ConfigError: a name is unknown, or of a maker that this task is too large for.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name in REFUSED:
            raise ConfigError(f"--makers has {name!r}, which the demo leaves out: {REFUSED[name]}")
        if name not in CHOICES:
            raise ConfigError(f"--makers has {name!r}: choose of {', '.join(CHOICES)}")
    return unique([*BASELINES, *names])


def unique(names: Sequence[str]) -> tuple[str, ...]:
    """Each once, in the order of their first places."""
    return tuple(dict.fromkeys(names))
