"""The Fisher types: for whose targets the output gradients are.

``empirical``: the data's, as the training loss has them; its backward brings them.  ``mc``: drawn
from the model's own distribution.  ``exact``: the generalized Gauss-Newton matrix, its Hessian in
the logits factor by factor.

All are those of the mean over the loss's M terms, and count M, so that they agree in scale:
where the data's targets are drawn from the model, all three have the same expectation.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from distcurv.errors import CaptureError, ConfigError
from distcurv.train.calls import Arming
from distcurv.train.likelihoods import CountsTerms, HasHessian, Likelihood, as_likelihood
from distcurv.train.sampling import Backprop, Generators, draw, factors, widened
from distcurv.train.terms import Terms, check_terms, on_device

log = logging.getLogger("distcurv.train")

FISHER_TYPES = ("empirical", "mc", "exact")
_MANY_PASSES = 2000


class Fisher:
    """What capture is told of the loss, in any of the Fisher types.

    Args:
        fisher_type: one of `FISHER_TYPES`.
        mean: whether the training loss is a mean over its terms, else it is their sum.
        seed: for the targets of ``mc``.

    Attributes:
        running: whether gradients that arrive now are those of `sample`.
    """

    def __init__(self, fisher_type: str, mean: bool, seed: int) -> None:
        self.fisher_type = fisher_type
        self.running = False
        self._mean = mean
        self._generators = Generators(seed)
        self._warned = False

    @property
    def is_empirical(self) -> bool:
        """Whether the training loss's own gradients count."""
        return self.fisher_type == "empirical"

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Gradients that arrive meanwhile are nobody's."""
        self.running = True
        try:
            yield
        finally:
            self.running = False

    def count_terms(self, arming: Arming | None, terms: Terms, divisor: Terms | None) -> None:
        """For ``empirical``: how many terms (unmasked tokens, ...) the loss of this micro-batch
        counts.  Between forward and backward, once for each; where no statistic is due (``arming``
        is None) it does nothing.

        Args:
            terms: M >= 0; a tensor has no dimension, nothing waits for it.
            divisor: what the loss was divided by where that is not M, e.g. the terms of all
                micro-batches together; read for a mean alone.

        Raises `CaptureError` in another place or for another Fisher type, `ConfigError` for what is
        no number."""
        if not self.is_empirical:
            raise CaptureError(
                f"count_terms() is for fisher_type='empirical'; this is {self.fisher_type!r}, "
                "where sample() counts the terms"
            )
        if arming is not None:
            arming.micro_batches.tell(terms, divisor)

    def observe_loss(
        self,
        arming: Arming | None,
        logits: Tensor,
        targets: Tensor,
        likelihood: str | Likelihood,
        n_samples: int,
        generator: torch.Generator | None,
    ) -> None:
        """One call for every Fisher type: `count_terms` with the likelihood's count for
        ``empirical``, else `sample`.  Raises as they do."""
        if not self.is_empirical:
            self.sample(arming, logits, likelihood, n_samples, generator, targets)
            return
        counting = _counting(as_likelihood(likelihood), "observe_loss needs")
        if arming is not None:
            self.count_terms(arming, counting.count(logits.detach(), targets), None)

    def sample(
        self,
        arming: Arming | None,
        logits: Tensor,
        likelihood: str | Likelihood,
        n_samples: int,
        generator: torch.Generator | None,
        targets: Tensor | None,
    ) -> None:
        """For ``mc`` and ``exact``: take the output statistics of the model's own distribution.
        Between forward and backward; where no statistic is due it does nothing.

        The result is the mean over the loss's M terms, whose number is counted here.  Statistics
        of draws are averaged, not gradients: the expectation does not depend on ``n_samples``.
        Several calls for one forward, one per output head, add up.  No ``.grad`` and no hook of
        DistributedDataParallel is touched.

        Args:
            arming: what is watched now.
            logits: the model's output of this forward, with its graph; samples are dimension 0.
            likelihood: a name in `LIKELIHOODS` or an object like those.
            n_samples: how many targets ``mc`` draws for each term; ``exact`` does not read it, and
                takes one backward pass for each element of a sample's logits.
            generator: on the device of ``logits``; by default an own one, made from the seed.
            targets: the data's, where the loss masks or weighs terms by them.

        Raises `CaptureError` for ``empirical``, for logits without a graph, or across a reentrant
        checkpoint, `ConfigError` for a bad ``n_samples`` or a likelihood that does not suffice,
        `ShapeError` for targets that do not fit."""
        if self.is_empirical:
            raise CaptureError(
                f"sample() is for fisher_type='mc' or 'exact'; this is {self.fisher_type!r}"
            )
        if n_samples < 1:
            raise ConfigError(f"n_samples is {n_samples}: give at least 1")
        likelihood = as_likelihood(likelihood)
        exact = self._exact(likelihood) if self.fisher_type == "exact" else None
        if arming is None or not arming.edges:
            return
        if not logits.requires_grad:
            raise CaptureError(
                "sample() got logits without a graph: pass the model's output of this forward, "
                "not detached and not made under no_grad"
            )
        wide = widened(logits)
        terms: Terms | None = None
        weights = None
        if targets is not None or isinstance(likelihood, CountsTerms):
            counting = _counting(likelihood, "targets need")
            terms, weights = counting.count(wide, targets), counting.weights(wide, targets)
        if generator is None:
            generator = self._generators.on(logits.device)
        backprop = Backprop(arming.edges, logits)
        with self.paused():
            if exact is not None:
                self._check_exact(arming, logits)
                for factor in factors(exact, wide, weights):
                    backprop(factor, 1.0)
            else:
                for _ in range(n_samples):
                    score, drawn = draw(likelihood, wide, weights, generator)
                    backprop(score, 1.0 / n_samples)
                    terms = drawn if terms is None else terms
        check_terms("the likelihood's count", terms)
        assert terms is not None
        counted = on_device(terms, logits.device)
        arming.micro_batches.tell_head(counted)
        for call in arming.edges:
            call.add_head(backprop.added.get(call), counted)

    def _exact(self, likelihood: Likelihood) -> HasHessian:
        _counting(likelihood, "fisher_type='exact' needs")
        if not isinstance(likelihood, HasHessian):
            raise ConfigError(
                f"fisher_type='exact' needs the Hessian of the loss in the logits: give "
                f"{type(likelihood).__name__} a method hessian_factors(logits), or use 'mc'"
            )
        return likelihood

    def _check_exact(self, arming: Arming, logits: Tensor) -> None:
        if len(logits) > max(call.samples for call in arming.edges):
            raise CaptureError(
                f"fisher_type='exact' got logits of shape {tuple(logits.shape)}, more samples than "
                "any layer had: keep the terms of a sample (its tokens) in dimensions of their "
                "own, [N, T, C], or the exact matrix would have products between them"
            )
        passes = logits[:1].numel()
        if passes > _MANY_PASSES and not self._warned:
            self._warned = True
            log.warning(
                "fisher_type='exact' takes %d backward passes for logits of shape %s; "
                "fisher_type='mc' takes one for each drawn target",
                passes,
                tuple(logits.shape),
            )


def _counting(likelihood: Likelihood, what: str) -> CountsTerms:
    if not isinstance(likelihood, CountsTerms):
        raise ConfigError(
            f"{what} a likelihood that knows which terms the loss counts: give "
            f"{type(likelihood).__name__} the methods count(logits, targets) and "
            "weights(logits, targets)"
        )
    return likelihood
