"""SmwEmpNaturalGradientMaker: the exact natural gradient of one batch's empirical Fisher matrix.

(F + λI)⁻¹ g with F = (1/N) sum_n g_n g_nᵀ and g = (1/N) sum_n g_n of the samples' gradients g_n.
By Sherman, Morrison and Woodbury only an N x N system is solved, see
`distcurv.curvature.woodbury`, but the N gradients are held at once: N·P numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distcurv.curvature.woodbury import within_span
from distcurv.makers.every_step import check_every_step, check_no_average
from distcurv.makers.preconditioned import PreconditionedGradientMaker
from distcurv.makers.preconditioning_config import PreconditioningConfig
from distcurv.makers.saved_tensors import fitting_tensors


@dataclass(frozen=True)
class SmwEmpNaturalGradientConfig(PreconditioningConfig):
    """Settings of `SmwEmpNaturalGradientMaker`.

    Attributes:
        data_size: by what the sum of F is divided; not set: the samples of the batch.
        damping: lambda > 0.
    """

    data_size: int | None = None
    damping: float = 1e-5


class SmwEmpNaturalGradientMaker(PreconditionedGradientMaker):
    """Adds (F + λI)⁻¹ g to ``.grad``, for all trained parameters together.

    The samples' gradients are those of `per_example_loss_grads`, which says what a sample is and
    what its loss: any model that treats samples one by one.  With a loss that averages over
    something else (tokens that are not masked) g is still the mean over samples.  With a loss that
    sums, F and g are sums as well.  The output and the loss are without a graph.

    Over the ranks of DistributedDataParallel both F and g are averaged, so that equal shares of a
    batch give what one rank makes of the whole of it.  Modules of ``ignore_modules`` get their
    part of g as it is.

    Args:
        model: bare or wrapped in DistributedDataParallel.
        config: `SmwEmpNaturalGradientConfig` or another `PreconditioningConfig` without intervals
            and ``ema_decay``: nothing outlives the batch.
    """

    def __init__(self, model: nn.Module, config: PreconditioningConfig) -> None:
        super().__init__(model, config)
        self.require_parameters()
        check_every_step(config, type(self).__name__)
        check_no_average(config, type(self).__name__)

    @torch.no_grad()
    def forward(self) -> None:
        """Output and loss; the gradient is made of the samples' gradients alone."""
        super().forward()

    @torch.no_grad()
    def backward(self) -> None:
        """Add the preconditioned gradient to ``.grad``."""
        chosen = {id(p) for p in self.chosen_parameters().values()}
        per_sample = dict(zip(self.trained, self.per_example_loss_grads(), strict=True))
        samples = len(next(iter(per_sample.values())))
        counts = self.rows_of_ranks(samples)
        # F and g are averages over ranks: F of the rows' squares, g of the rows with weights.
        own_size = max(samples, 1)  # of a rank without samples nothing is divided
        weight = 1 / own_size if self.loss_is_mean else 1.0
        size = (self.config.data_size or own_size) if self.loss_is_mean else 1
        scale = (self.world_size * size) ** -0.5
        rows = {
            p: g.reshape(samples, p.numel()) * scale
            for p, g in per_sample.items()
            if id(p) in chosen
        }
        weights = next(iter(per_sample.values())).new_full(
            (samples,), weight / (self.world_size * scale)
        )
        grads = {p: weight * g.sum(0) for p, g in per_sample.items() if id(p) not in chosen}
        if rows:
            kernel = torch.zeros((), dtype=torch.float64, device=weights.device)
            for part in rows.values():
                every = self.gather_rows(part, counts).double()
                kernel = kernel + every @ every.mT
            solved = within_span(kernel, self.gather_rows(weights, counts), self.config.damping).to(
                weights.dtype
            )
            own = solved.split(counts)[self.own_rank] * self.world_size  # averaged below
            grads.update({p: (own @ part).view_as(p) for p, part in rows.items()})
        self.average_over_ranks([*grads.values()])
        for parameter, grad in grads.items():
            _add(parameter, grad)

    def precondition(self) -> None:
        """Done in `backward`."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` of the same maker: nothing but the step; raises `StateError`
        for another one."""
        fitting_tensors(state_dict, {}, (), self.trained[0].device, type(self).__name__)
        super().load_state_dict(state_dict)


def _add(parameter: nn.Parameter, grad: Tensor) -> None:
    parameter.grad = grad if parameter.grad is None else parameter.grad + grad
