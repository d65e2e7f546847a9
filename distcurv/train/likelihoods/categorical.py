"""Classes: `F.cross_entropy`, with all its variants.

Letters: N samples, T terms of a sample (tokens, pixels), C classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from distcurv.errors import ConfigError, ShapeError


class Categorical:
    """Classes by logits [N, C], [N, ..., C] or, with ``class_dim=1``, [N, C, ...].

    The Hessian of a term is w (diag(p) - p p^T) with p the softmax, whatever the target: what is
    linear in the logits has no second derivative, so smoothed or soft targets change only w, the
    total weight of the target's probabilities.  That is 1 without class weights.

    Args:
        class_dim: where the classes are: -1 (last), or 1 as `F.cross_entropy` has them.
        weight: class weights [C] of the loss; needs the targets.  As in torch, a ``mean`` divides
            by the sum of the weights of the targets, but for class probabilities as targets by
            the number of terms.
        label_smoothing: that of the loss, between 0 and 1.
        ignore_index: targets (class indices) that the loss leaves out.

    Raises `ConfigError` for a bad class_dim, weight or label_smoothing.
    """

    def __init__(
        self,
        class_dim: int = -1,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
    ) -> None:
        if class_dim not in (-1, 1):
            raise ConfigError(f"Categorical.class_dim is {class_dim}: use -1 or 1")
        if weight is not None and weight.dim() != 1:
            raise ConfigError(
                f"Categorical.weight has the shape {tuple(weight.shape)}: give one of each class"
            )
        if not 0 <= label_smoothing <= 1:
            raise ConfigError(
                f"Categorical.label_smoothing is {label_smoothing}: give a number from 0 to 1"
            )
        self.class_dim = class_dim
        self.weight = weight
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index

    def sample(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Class indices [N, ...]."""
        classes_last = self._classes_last(logits)
        probabilities = classes_last.flatten(0, -2).softmax(-1)
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        return drawn.view(classes_last.shape[:-1])

    def nll(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy with class indices, summed."""
        flat = self._classes_last(logits).flatten(0, -2)
        return F.cross_entropy(flat, targets.flatten(), reduction="sum")

    def hessian_factors(self, logits: Tensor) -> Iterator[Tensor]:
        """For each of the T terms and each class c: sqrt(p_c) (e_c - p), T C in all."""
        p_NTC = self._classes_last(logits).softmax(-1)
        shape = p_NTC.shape
        p_NTC = p_NTC.flatten(1, -2) if p_NTC.dim() > 2 else p_NTC.unsqueeze(1)
        for term in range(p_NTC.shape[1]):
            p_NC = p_NTC[:, term]
            for label in range(p_NTC.shape[2]):
                factor_NTC = torch.zeros_like(p_NTC)
                factor_NTC[:, term] = -p_NC
                factor_NTC[:, term, label] += 1
                factor_NTC[:, term] *= p_NC[:, label : label + 1].sqrt()
                yield factor_NTC.view(shape).movedim(-1, self.class_dim)

    def count(self, logits: Tensor, targets: Tensor | None) -> int | Tensor:
        """The number of terms that are not ignored, or with class weights the sum of theirs."""
        terms = self._classes_last(logits)[..., 0].numel()
        if targets is None:
            self._refuse_weight()
            return terms
        if self._are_probabilities(logits, targets):
            return terms
        kept = targets != self.ignore_index
        if self.weight is None:
            return kept.sum()
        return self._of_targets(targets, kept).sum()

    def weights(self, logits: Tensor, targets: Tensor | None) -> Tensor | None:
        """The total weight of each term's target, 0 for the ignored."""
        if targets is None:
            self._refuse_weight()
            return None
        smoothing = self.label_smoothing
        if self._are_probabilities(logits, targets):
            soft = targets.movedim(self.class_dim, -1).to(logits.dtype)
            soft = soft * (1 - smoothing) + smoothing / soft.shape[-1]
            total = (soft if self.weight is None else soft * self.weight.to(soft)).sum(-1)
            return total.unsqueeze(self.class_dim)
        kept = targets != self.ignore_index
        if self.weight is None:
            return kept.to(logits.dtype).unsqueeze(self.class_dim)
        weights = (1 - smoothing) * self._of_targets(targets, kept) + smoothing * self.weight.mean()
        return weights.where(kept, 0.0).to(logits.dtype).unsqueeze(self.class_dim)

    def _of_targets(self, targets: Tensor, kept: Tensor) -> Tensor:
        """The class weights of the targets, 0 for the ignored."""
        assert self.weight is not None
        return self.weight[targets.where(kept, 0)].where(kept, 0.0)

    def _classes_last(self, logits: Tensor) -> Tensor:
        if logits.dim() < 2:
            raise ShapeError(
                f"Categorical got logits of shape {tuple(logits.shape)}: give [N, C], [N, ..., C], "
                "or [N, C, ...] and class_dim=1"
            )
        return logits.movedim(self.class_dim, -1)

    def _refuse_weight(self) -> None:
        if self.weight is not None:
            raise ConfigError(
                "Categorical with class weights needs the targets of the data: give targets="
            )

    def _are_probabilities(self, logits: Tensor, targets: Tensor) -> bool:
        """Whether the targets are class probabilities, not indices."""
        shape = self._classes_last(logits).shape
        if self.weight is not None and len(self.weight) != shape[-1]:
            raise ShapeError(
                f"Categorical has {len(self.weight)} class weights, but the logits of shape "
                f"{tuple(logits.shape)} have {shape[-1]} classes (class_dim={self.class_dim})"
            )
        if targets.is_floating_point() and targets.shape == logits.shape:
            return True
        if targets.is_floating_point() or targets.shape != shape[:-1]:
            raise ShapeError(
                f"Categorical got {targets.dtype} targets of shape {tuple(targets.shape)} for "
                f"logits of shape {tuple(logits.shape)} with class_dim={self.class_dim}: give "
                f"class indices {tuple(shape[:-1])}, or probabilities in the shape of the logits"
            )
        return False
