"""Output gradients for targets drawn from the model, for the Fisher type ``mc``.

They are taken with `torch.autograd.grad` at the edges where the captured calls ended, so that no
parameter's ``.grad`` and no hook on a parameter (DistributedDataParallel) is touched.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from distcurv.train.calls import Call
from distcurv.train.likelihood import Likelihood


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


def sample_calls(
    edges: Mapping[Call, GradientEdge],
    logits: Tensor,
    likelihood: Likelihood,
    n_samples: int,
    generator: torch.Generator,
    *,
    mean: bool,
) -> None:
    """Add to each call the output statistic of targets drawn from p(y | logits).

    The statistics of the draws are averaged, so their expectation does not depend on
    ``n_samples``; with ``mean`` they are also averaged over a sample's loss terms (elements of
    the targets), which is the Fisher of the mean loss.  The graph is retained.
    """
    # In half precision the probabilities and the loss would be rounded.
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    for _ in range(n_samples):
        with torch.autocast(logits.device.type, enabled=False):
            targets = likelihood.sample(wide.detach(), generator)
            loss = likelihood.nll(wide, targets)
        grads = torch.autograd.grad(
            loss, tuple(edges.values()), retain_graph=True, allow_unused=True
        )
        for call, grad in zip(edges, grads, strict=True):
            per_term = call.samples / targets.numel() if mean else 1.0
            call.add_sampled(grad, per_term / n_samples)
