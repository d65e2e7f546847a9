"""What a loss must say of itself for the Fisher types ``mc`` and ``exact``.

A likelihood is p(y | logits) of the model's own output.  ``mc`` draws targets from it (Martens
2020, "New insights and perspectives on the natural gradient method", section 5); ``exact`` takes
the Hessian of its negative logarithm in the logits, the middle of the generalized Gauss-Newton
matrix (section 8 there).  For the likelihoods of this folder the Hessian does not depend on the
targets, and both are the same in expectation.

`Likelihood` is all that ``mc`` needs of a user's own object; a mask, weights, and ``exact`` take
the methods of `CountsTerms` and `HasHessian` as well.

A *term* is one summand of the loss: a token, a pixel, an output of a regression.  An element of the
logits belongs to one term.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Likelihood(Protocol):
    """p(y | logits)."""

    def sample(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Targets drawn from p(y | logits), one element per term of the loss.  ``logits`` is
        detached, in float32 or float64, and must not be changed.  ``generator`` lives on the
        device of ``logits``."""
        ...

    def nll(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The negative log-likelihood of such targets summed over all terms, a scalar, unweighted
        and unmasked; constants may be left out.  Differentiable in ``logits``."""
        ...


@runtime_checkable
class CountsTerms(Protocol):
    """Which terms the loss counts, and how much: from the targets of the data, where it depends
    on them (``targets`` may be None where it does not)."""

    def count(self, logits: Tensor, targets: Tensor | None) -> int | Tensor:
        """What the ``mean`` reduction of the loss divides by: the number of its terms, without
        masked ones.  A tensor has no dimension; nothing waits for a device."""
        ...

    def weights(self, logits: Tensor, targets: Tensor | None) -> Tensor | None:
        """What each term's Hessian is multiplied with: >= 0, 0 for a masked term, broadcastable
        to ``logits``; None where all are 1."""
        ...


@runtime_checkable
class HasHessian(Protocol):
    """The Hessian of the negative log-likelihood in the logits."""

    def hessian_factors(self, logits: Tensor) -> Iterator[Tensor]:
        """Tensors V_k in the shape and dtype of ``logits`` (detached, float32 or float64), such
        that for every sample n (dimension 0) sum_k V_k[n] V_k[n]^T is the Hessian of the sum of
        its terms, unweighted and unmasked.

        In one V_k a sample may have elements of one term alone: what a layer before an attention
        gets from two terms at once would be squared together.  Each V_k costs a backward pass."""
        ...
