"""Small models and their batches for tests of makers: an MLP, a conv net, tokens (N, T, C)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distcurv.makers import GradientMaker


class Tokens(nn.Module):
    """Embeds T = 5 tokens, mixes them a little and gives each of them a distribution over 6."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.embed(x))
        logits: Tensor = self.head(torch.tanh(hidden + hidden.mean(1, keepdim=True)))
        return logits


def model_of(name: str, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name == "mlp":
            return nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
        if name == "conv":
            return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3))
        return Tokens()


def batch_of(name: str, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    if name == "tokens":
        x = torch.randint(0, 6, (4, 5), generator=generator)
        return x, x.roll(1, 1)
    shape = {"mlp": (8, 7), "conv": (8, 2, 4, 4)}[name]
    x = torch.randn(shape, generator=generator)
    return x, torch.randint(0, 3, (8,), generator=generator)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def plain_gradients(model: nn.Module, name: str, step: int) -> dict[str, Tensor]:
    """The gradient of a step's batch by parameter, by autograd alone."""
    x, t = batch_of(name, step)
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(loss_of(model(x), t), list(named.values()))
    return dict(zip(named, grads, strict=True))


def made_gradients(gm: GradientMaker, name: str, step: int) -> dict[str, Tensor]:
    """What a maker leaves in ``.grad`` for a step's batch."""
    x, t = batch_of(name, step)
    model: Any = gm.model
    model.zero_grad(set_to_none=True)
    gm.setup_loss_call(loss_of, gm.setup_model_call(model, x), t)
    gm.forward_and_backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
