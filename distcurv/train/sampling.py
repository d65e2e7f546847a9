"""Output gradients for other targets than the data's, for the Fisher types ``mc`` and ``exact``.

What reaches a layer's output from tensors V_k at the logits is J^T V_k, so that with
sum_k V_k V_k^T = H (in expectation, or exactly) the statistics add up to J^T H J.  The products are
taken with `torch.autograd.grad` at the edges where the captured calls ended, so that no parameter's
``.grad`` and no hook on a parameter (DistributedDataParallel) is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from distcurv.curvature.spec import Tensors
from distcurv.errors import CaptureError
from distcurv.train.calls import Call, plus
from distcurv.train.ddp_sink import below_sink
from distcurv.train.likelihoods import HasHessian, Likelihood
from distcurv.train.sample_statistics import samples_statistic
from distcurv.train.sample_uses import Shown


class Generators:
    """One generator for each device, made from a seed when it is first asked for."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._made: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        """The device's generator, where the last draw left it."""
        if device not in self._made:
            self._made[device] = torch.Generator(device).manual_seed(self._seed)
        return self._made[device]


def widened(logits: Tensor) -> Tensor:
    """Detached, and in float32 where they are narrower: probabilities would be rounded."""
    return logits.detach().to(torch.promote_types(logits.dtype, torch.float32))


def draw(
    likelihood: Likelihood, logits: Tensor, weights: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, int]:
    """The gradient in the (wide) logits of the negative log-likelihood of targets drawn from them,
    each term times the root of its weight, and the number of targets drawn.

    Scores have mean zero and those of two terms are independent, so the expectation of the
    gradient's square has no products between terms, and that of one term is its Hessian."""
    with torch.autocast(logits.device.type, enabled=False):
        with torch.no_grad():
            targets = likelihood.sample(logits, generator)
        with torch.enable_grad():
            leaf = logits.clone().requires_grad_(True)
            (score,) = torch.autograd.grad(likelihood.nll(leaf, targets), leaf)
        return _weighted(score, weights), targets.numel()


def factors(likelihood: HasHessian, logits: Tensor, weights: Tensor | None) -> Iterator[Tensor]:
    """The factors of the Hessian in the (wide) logits, each term's times the root of its weight."""
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        for factor in likelihood.hessian_factors(logits):
            yield _weighted(factor, weights)


def _weighted(vector: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return vector
    # A masked term may hold anything.
    return torch.where(weights > 0, vector * weights.sqrt().to(vector.dtype), 0.0)


class Backprop:
    """From the logits to the calls: adds up the output statistic of each.

    Attributes:
        added: by call, unscaled sums; without the calls that nothing has reached.
    """

    def __init__(self, edges: Mapping[Call, GradientEdge], logits: Tensor) -> None:
        self._edges = dict(edges)
        self._root = below_sink(logits)
        self._dtype = logits.dtype
        self.added: dict[Call, Tensors] = {}

    def __call__(self, vector: Tensor, weight: float) -> None:
        """Add J^T V V^T J times ``weight``, V in the shape of the logits.  The graph is retained.

        Raises `CaptureError` where a checkpoint of the reentrant kind is in the way."""
        try:
            grads: tuple[Tensor | None, ...] = torch.autograd.grad(
                self._root,
                tuple(self._edges.values()),
                grad_outputs=vector.to(self._dtype),
                retain_graph=True,
                allow_unused=True,
            )
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise CaptureError(
                "the Fisher types mc and exact cannot see through a reentrant activation "
                "checkpoint: call torch.utils.checkpoint with use_reentrant=False"
            ) from error
        groups: dict[tuple[str, int], list[tuple[Call, Shown]]] = {}
        for call, grad in zip(self._edges, grads, strict=True):
            if grad is None:
                continue
            self._add(call, call.read_output(grad, weight)())
            shown = call.show(grad, 1.0)
            if shown is not None:
                key = call.block.name, id(call.micro_batch)
                groups.setdefault(key, []).append((call, shown))
        for group in groups.values():
            first = group[0][0]
            made = samples_statistic(first.block.spec, [shown for _, shown in group], first.bases)
            # To one of the calls, whichever: those of a block are added up.
            self._add(first, {key: value * weight for key, value in made.items()})

    def _add(self, call: Call, read: Tensors) -> None:
        self.added[call] = plus(self.added.get(call, {}), read)
