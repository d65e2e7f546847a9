"""Yes/no outputs: `F.binary_cross_entropy_with_logits`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from distcurv.errors import ShapeError
from distcurv.train.likelihoods.elements import check_shape, one_at_a_time


class Bernoulli:
    """Independent yes/no outputs by logits of any shape [N, ...]; each is a term.

    The Hessian of a term is w (1 + (p - 1) y) s (1 - s), with s the sigmoid of the logit, y the
    target (between 0 and 1), w the weight and p the weight of positives.

    Args:
        weight: that of the loss, broadcastable to the logits.  As in torch, a ``mean`` divides by
            the number of terms whatever they weigh.
        pos_weight: that of the loss, broadcastable to the logits; needs the targets.
        mask: broadcastable to the logits; False or 0: the loss leaves the term out, and a ``mean``
            does not count it.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        self.weight = weight
        self.pos_weight = pos_weight
        self.mask = mask

    def sample(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Zeros and ones in the shape of ``logits``."""
        return torch.bernoulli(logits.sigmoid(), generator=generator)

    def nll(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Binary cross-entropy with logits, summed."""
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")

    def hessian_factors(self, logits: Tensor) -> Iterator[Tensor]:
        """One for each output of a sample."""
        return one_at_a_time((logits.sigmoid() * (-logits).sigmoid()).sqrt())

    def count(self, logits: Tensor, targets: Tensor | None) -> int | Tensor:
        """The number of outputs that the mask leaves."""
        if self.mask is None:
            return logits.numel()
        check_shape("Bernoulli", logits, mask=self.mask)
        return (self.mask != 0).expand(logits.shape).sum()

    def weights(self, logits: Tensor, targets: Tensor | None) -> Tensor | None:
        """``weight`` times that of positives, 0 for the masked.

        Raises `ShapeError` for a weight, mask or targets that do not fit the logits."""
        check_shape("Bernoulli", logits, weight=self.weight, mask=self.mask)
        weights = self.weight
        if self.pos_weight is not None:
            check_shape("Bernoulli", logits, pos_weight=self.pos_weight)
            if targets is None or targets.shape != logits.shape:
                got = "none" if targets is None else f"some of shape {tuple(targets.shape)}"
                raise ShapeError(
                    "Bernoulli with pos_weight needs targets in the shape of the logits "
                    f"{tuple(logits.shape)}; got {got}"
                )
            positive = 1 + (self.pos_weight - 1) * targets
            weights = positive if weights is None else weights * positive
        if self.mask is None:
            return weights
        kept = self.mask != 0
        return kept.to(logits.dtype) if weights is None else weights.where(kept, 0.0)
