"""The model's own predictive distributions, for the Fisher type ``mc``.

The Fisher is the expectation of g g^T over targets drawn from p(y | logits) of the model itself,
not over the data's targets (Martens 2020, "New insights and perspectives on the natural gradient
method", section 5).  A likelihood knows how to draw such targets and what they cost.

A new likelihood is one class here and one line in `LIKELIHOODS`; users may pass any object that
has the two methods of `Likelihood`.

Letters: N samples, C classes or outputs.
"""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from distcurv.errors import ConfigError, ShapeError


@runtime_checkable
class Likelihood(Protocol):
    """p(y | logits)."""

    def sample(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Targets drawn from p(y | logits), one element per loss term: what a ``mean`` reduction
        of the training loss would divide by is their number.  ``logits`` is detached, in float32
        or float64, and must not be changed.  ``generator`` lives on the device of ``logits``."""
        ...

    def nll(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The negative log-likelihood summed over all terms, a scalar; constants may be left
        out.  Differentiable in ``logits``."""
        ...


class Categorical:
    """Classes by logits [N, C] or [N, ..., C] (the classes last), as `F.cross_entropy` has them."""

    def sample(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Class indices [N, ...]."""
        if logits.dim() < 2:
            raise ShapeError(
                f"Categorical got logits of shape {tuple(logits.shape)}: give [N, C] or [N, ..., C]"
            )
        probabilities = logits.flatten(0, -2).softmax(-1)
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        return drawn.view(logits.shape[:-1])

    def nll(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, summed."""
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")


class Bernoulli:
    """Independent yes/no outputs by logits of any shape [N, ...]."""

    def sample(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Zeros and ones in the shape of ``logits``."""
        return torch.bernoulli(logits.sigmoid(), generator=generator)

    def nll(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Binary cross-entropy with logits, summed."""
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")


class Gaussian:
    """Independent normal outputs around the model's outputs [N, ...].

    Args:
        var: their variance, > 0.  The squared error without a factor 1/2 (`F.mse_loss`) is the
            negative log-likelihood for 0.5, with the factor for 1.
    """

    def __init__(self, var: float = 1.0) -> None:
        if not var > 0:
            raise ConfigError(f"Gaussian.var is {var}: give a variance > 0")
        self.var = var

    def sample(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """The outputs plus noise."""
        noise = torch.empty_like(logits).normal_(generator=generator)
        return logits + math.sqrt(self.var) * noise

    def nll(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Squared error over 2 var, summed."""
        return (logits - targets).square().sum() / (2 * self.var)


LIKELIHOODS: dict[str, type[Categorical | Bernoulli | Gaussian]] = {
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
}


def as_likelihood(likelihood: str | Likelihood) -> Likelihood:
    """The likelihood itself, or a new one by its name in `LIKELIHOODS` with default settings.

    Raises `ConfigError` for anything else."""
    if isinstance(likelihood, str):
        if likelihood not in LIKELIHOODS:
            raise ConfigError(
                f"likelihood is {likelihood!r}: use one of {', '.join(LIKELIHOODS)}, or an object"
            )
        return LIKELIHOODS[likelihood]()
    if isinstance(likelihood, type) or not isinstance(likelihood, Likelihood):
        raise ConfigError(
            f"likelihood is {likelihood!r}: give an object with the methods "
            "sample(logits, generator) and nll(logits, targets), e.g. Categorical()"
        )
    return likelihood
