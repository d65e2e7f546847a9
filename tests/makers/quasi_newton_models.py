"""Small models for the quasi-Newton makers, with their batches and losses.

N = 12 samples; images are [2, 5, 5], token sequences have T = 4 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distcurv.makers import GradientMaker

N, T, CLASSES, WORDS = 12, 4, 3, 7


class Tokens(nn.Module):
    """Embedding, norm and Linear layers on (N, T, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 5)
        self.norm = nn.LayerNorm(5)
        self.fc1 = nn.Linear(5, 6)
        self.fc2 = nn.Linear(6, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.fc2(torch.tanh(self.fc1(self.norm(self.embedding(ids)))))
        return out.flatten(0, 1)


class Setting(NamedTuple):
    model: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator, int], Tensor]
    terms: int  # of the loss, for each sample


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, CLASSES))


def _conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 3, 3, stride=2, bias=False),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    )


def _features(*shape: int) -> Callable[[torch.Generator, int], Tensor]:
    return lambda generator, n: torch.randn(n, *shape, generator=generator, dtype=torch.float64)


SETTINGS = {
    "mlp": Setting(_mlp, _features(5), 1),
    "conv": Setting(_conv, _features(2, 5, 5), 1),
    "tokens": Setting(
        Tokens, lambda generator, n: torch.randint(WORDS, (n, T), generator=generator), T
    ),
}


def make_model(name: str, seed: int = 0) -> nn.Module:
    """In float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SETTINGS[name].model().double()


def make_batch(name: str, seed: int, n: int = N) -> tuple[Tensor, Tensor]:
    setting = SETTINGS[name]
    generator = torch.Generator().manual_seed(seed)
    x = setting.inputs(generator, n)
    return x, torch.randint(CLASSES, (n * setting.terms,), generator=generator)


def set_up(gm: GradientMaker, model: Any, batch: tuple[Tensor, Tensor]) -> None:
    x, t = batch
    gm.setup_loss_call(F.cross_entropy, gm.setup_model_call(model, x), t)


def one_step(gm: GradientMaker, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """As a user does one, without the optimizer's part."""
    model.zero_grad()
    set_up(gm, model, batch)
    gm.forward_and_backward()


def move(model: nn.Module, lr: float = 0.05) -> None:
    """Plain descent along what is in ``.grad``, of a length that no preconditioner can spoil."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    length = torch.stack([g.norm() for g in grads]).norm()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= lr / (1e-3 + length) * p.grad


def train(gm: GradientMaker, model: nn.Module, name: str, steps: range) -> list[Tensor]:
    """Some steps, each on a batch of its own; the parameters afterwards."""
    for step in steps:
        one_step(gm, model, make_batch(name, 100 + step))
        move(model)
    return [p.detach().clone() for p in model.parameters()]


def raw_gradient(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """By name, by plain PyTorch; neither ``.grad`` nor buffers change."""
    x, t = batch
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    params = dict(model.named_parameters())
    out = torch.func.functional_call(model, {**params, **buffers}, (x,))
    grads = torch.autograd.grad(F.cross_entropy(out, t), list(params.values()))
    return dict(zip(params, grads, strict=True))
