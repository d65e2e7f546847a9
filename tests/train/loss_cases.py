"""Losses with the likelihood that describes them; every entry of `LIKELIHOODS` must have some.

The oracles are torch's own loss functions: their Hessians in the logits by `torch.func`, and what
their mean divides by from the quotient of sum and mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from distcurv.train.likelihoods import Bernoulli, Categorical, Gaussian

N, T, C = 4, 3, 4


@dataclass(frozen=True)
class LossCase:
    """Attributes:
    kind: the name in `LIKELIHOODS`.
    likelihood: what describes the loss.
    loss: of (logits, targets, reduction), as a user writes it.
    targets: of the data.
    tokens: whether the logits are [N, T, C], else [N, C].
    classes_second: whether the loss wants them as [N, C, T].
    """

    kind: str
    likelihood: Categorical | Bernoulli | Gaussian
    loss: Callable[[Tensor, Tensor, str], Tensor]
    targets: Tensor
    tokens: bool = True
    classes_second: bool = False

    def shaped(self, logits: Tensor) -> Tensor:
        """The logits as the loss wants them, from [N, T, C] or [N, C]."""
        return logits.movedim(-1, 1) if self.classes_second else logits

    def logits(self) -> Tensor:
        """Some, as the model gives them."""
        shape = (N, T, C) if self.tokens else (N, C)
        return 2 * torch.randn(shape, generator=seeded(1), dtype=torch.float64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(*shape: int, seed: int = 2) -> Tensor:
    """Between 0.2 and 1.8."""
    return 0.2 + 1.6 * torch.rand(shape, generator=seeded(seed), dtype=torch.float64)


def labels(*shape: int) -> Tensor:
    return torch.randint(C, shape, generator=seeded(3))


def masked(targets: Tensor, ignore_index: int) -> Tensor:
    """With two ignored terms of the first sample and one of the last."""
    targets = targets.clone()
    targets[0, :2] = targets[-1, 1] = ignore_index
    return targets


def cross_entropy(**settings: object) -> Callable[[Tensor, Tensor, str], Tensor]:
    """Of logits [N, C] or [N, C, T]."""
    return lambda x, y, reduction: F.cross_entropy(x, y, reduction=reduction, **settings)  # type: ignore[arg-type]


def last(loss: Callable[[Tensor, Tensor, str], Tensor]) -> Callable[[Tensor, Tensor, str], Tensor]:
    """Of logits [N, T, C]."""
    return lambda x, y, reduction: loss(x.flatten(0, 1), y.flatten(0, 1), reduction)


def binary(x: Tensor, y: Tensor, reduction: str, **settings: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(x, y, reduction=reduction, **settings)


def masked_binary(x: Tensor, y: Tensor, reduction: str) -> Tensor:
    total = (binary(x, y, "none") * MASK).sum()
    return total if reduction == "sum" else total / (MASK.expand(N, T, C).sum())


def squares(x: Tensor, y: Tensor, reduction: str) -> Tensor:
    return F.mse_loss(x, y, reduction=reduction)


def normal(x: Tensor, y: Tensor, reduction: str) -> Tensor:
    return F.gaussian_nll_loss(x, y, VARIANCE.expand_as(x), reduction=reduction)


WEIGHT = numbers(C)
ELEMENTS = numbers(N, T, C, seed=5)
PROBABILITIES = numbers(N, T, C, seed=6).softmax(-1)
VARIANCE = numbers(N, 1, C, seed=7)
POSITIVE = numbers(C, seed=8)
MASK = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
MASK = MASK.double().unsqueeze(-1)
YES_NO = (numbers(N, T, C, seed=9) > 1).double()
REAL = numbers(N, T, C, seed=10)
SMOOTH = Categorical(weight=WEIGHT, label_smoothing=0.2, ignore_index=1)

CASES: dict[str, LossCase] = {
    "classes": LossCase("categorical", Categorical(), cross_entropy(), labels(N), tokens=False),
    "tokens": LossCase("categorical", Categorical(), last(cross_entropy()), labels(N, T)),
    "classes second": LossCase(
        "categorical", Categorical(1), cross_entropy(), labels(N, T), classes_second=True
    ),
    "ignored": LossCase(
        "categorical", Categorical(), last(cross_entropy()), masked(labels(N, T), -100)
    ),
    "smoothed": LossCase(
        "categorical",
        Categorical(label_smoothing=0.3),
        last(cross_entropy(label_smoothing=0.3)),
        masked(labels(N, T), -100),
    ),
    "class weights": LossCase(
        "categorical",
        Categorical(weight=WEIGHT),
        last(cross_entropy(weight=WEIGHT)),
        labels(N, T),
    ),
    "weighted, smoothed, ignored, second": LossCase(
        "categorical",
        Categorical(1, WEIGHT, 0.2, ignore_index=-1),
        cross_entropy(weight=WEIGHT, label_smoothing=0.2, ignore_index=-1),
        masked(labels(N, T), -1),
        classes_second=True,
    ),
    "an ignored class": LossCase(
        "categorical",
        SMOOTH,
        last(cross_entropy(weight=WEIGHT, label_smoothing=0.2, ignore_index=1)),
        labels(N, T),
    ),
    "probabilities": LossCase("categorical", Categorical(), last(cross_entropy()), PROBABILITIES),
    "weighted, smoothed probabilities": LossCase(
        "categorical",
        Categorical(1, WEIGHT, 0.2),
        cross_entropy(weight=WEIGHT, label_smoothing=0.2),
        PROBABILITIES.mT,
        classes_second=True,
    ),
    "yes or no": LossCase("bernoulli", Bernoulli(), binary, YES_NO),
    "single outputs": LossCase("bernoulli", Bernoulli(), binary, YES_NO[:, 0], tokens=False),
    "weighted yes or no": LossCase(
        "bernoulli",
        Bernoulli(weight=ELEMENTS, pos_weight=POSITIVE),
        lambda x, y, r: binary(x, y, r, weight=ELEMENTS, pos_weight=POSITIVE),
        PROBABILITIES,
    ),
    "masked yes or no": LossCase("bernoulli", Bernoulli(mask=MASK), masked_binary, YES_NO),
    "squares": LossCase("gaussian", Gaussian(0.5), squares, REAL),
    "weighted squares": LossCase(
        "gaussian",
        Gaussian(0.5, weight=ELEMENTS),
        lambda x, y, r: F.mse_loss(x, y, reduction=r, weight=ELEMENTS),
        REAL,
    ),
    "variances": LossCase("gaussian", Gaussian(VARIANCE), normal, REAL),
}


def true_count(case: LossCase) -> Tensor:
    """What the mean of the loss divides by."""
    logits = case.shaped(case.logits())
    total, mean = (case.loss(logits, case.targets, reduction) for reduction in ("sum", "mean"))
    return total / mean


def true_hessian(case: LossCase, logits: Tensor) -> Tensor:
    """Of the summed loss in the logits as the model gives them, [K, K] over all elements."""
    shape = logits.shape

    def loss(flat: Tensor) -> Tensor:
        return case.loss(case.shaped(flat.view(shape)), case.targets, "sum")

    return torch.func.hessian(loss)(logits.flatten())  # type: ignore[no-any-return]
