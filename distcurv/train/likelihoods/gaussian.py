"""Outputs with normal noise: squared errors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distcurv.errors import ConfigError
from distcurv.train.likelihoods.elements import check_shape, one_at_a_time


class Gaussian:
    """Independent normal outputs around the model's outputs [N, ...]; each output is a term.

    The Hessian of a term is w / var, with w its weight.

    Args:
        var: their variance, > 0: a number, or a tensor broadcastable to the outputs (as
            `F.gaussian_nll_loss` has it, with the model's part in it left out of account).  The
            squared error without a factor 1/2 (`F.mse_loss`) is the negative log-likelihood for
            0.5, with the factor for 1.
        weight: of the terms, broadcastable to the outputs; zeros (False) mask.  As `F.mse_loss` has
            it, a ``mean`` divides by the sum of the weights.

    Raises `ConfigError` for a variance that is a number or on the CPU and not > 0.
    """

    def __init__(self, var: float | Tensor = 1.0, weight: Tensor | None = None) -> None:
        known = not isinstance(var, Tensor) or var.device.type == "cpu"
        if known and not bool((torch.as_tensor(var) > 0).all()):
            raise ConfigError(f"Gaussian.var is {var}: give a variance > 0")
        self.var = var
        self.weight = weight

    def sample(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """The outputs plus noise."""
        noise = torch.empty_like(logits).normal_(generator=generator)
        return logits + self.var**0.5 * noise

    def nll(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Squared error over 2 var, summed."""
        return ((logits - targets).square() / (2 * self.var)).sum()

    def hessian_factors(self, logits: Tensor) -> Iterator[Tensor]:
        """One for each output of a sample."""
        if isinstance(self.var, Tensor):
            check_shape("Gaussian", logits, var=self.var)
        return one_at_a_time(torch.ones_like(logits) / self.var**0.5)

    def count(self, logits: Tensor, targets: Tensor | None) -> int | Tensor:
        """The number of outputs, or the sum of their weights."""
        if self.weight is None:
            return logits.numel()
        check_shape("Gaussian", logits, weight=self.weight)
        return self.weight.expand(logits.shape).sum()

    def weights(self, logits: Tensor, targets: Tensor | None) -> Tensor | None:
        """``weight``.  Raises `ShapeError` where it does not fit the outputs."""
        check_shape("Gaussian", logits, weight=self.weight)
        return None if self.weight is None else self.weight.to(logits.dtype)
