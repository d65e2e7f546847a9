"""The three models of `bench step`, on random data: only the time of a step is asked of them.

Layers of equal or close shapes as in published K-FAC comparisons: the deep autoencoder of Hinton
and Salakhutdinov 2006, a small transformer language model, a residual network for 32×32 images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distcurv.demo.tasks import CharLM

AUTOENCODER_WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
CHARLM_WIDTH, CHARLM_LAYERS, CHARLM_HEADS, CHARLM_VOCABULARY = 256, 4, 4, 97
CHARLM_BATCH, CHARLM_CONTEXT = 16, 64  # 1,024 tokens
CONVNET_WIDTHS = (16, 32, 64)


@dataclass
class Problem:
    """A model with one batch.

    Attributes:
        model: with its initial weights.
        inputs, targets: the batch.
        logits: model output → what the loss function takes.
        loss_function: (logits, targets) → mean loss, has an argument ``reduction``.
        sequences: a sample is a sequence, over whose positions the loss is averaged as well.
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    logits: Callable[[Tensor], Tensor]
    loss_function: Callable[..., Tensor]
    sequences: bool = False

    def loss(self) -> Tensor:
        """The batch's loss, with its graph."""
        return self.loss_function(self.logits(self.model(self.inputs)), self.targets)

    def to(self, device: str) -> Problem:
        """The same on a device."""
        return replace(
            self,
            model=self.model.to(device),
            inputs=self.inputs.to(device),
            targets=self.targets.to(device),
        )


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with batch norm, and a shortcut."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        plain = stride == 1 and into == out
        self.shortcut = nn.Identity() if plain else nn.Conv2d(into, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def _autoencoder() -> Problem:
    layers: list[nn.Module] = []
    for into, out in pairwise(AUTOENCODER_WIDTHS):
        layers += [nn.Linear(into, out), nn.Tanh()]
    images = torch.rand(256, AUTOENCODER_WIDTHS[0])
    return Problem(
        nn.Sequential(*layers[:-1]),
        images,
        images,
        lambda out: out,
        F.binary_cross_entropy_with_logits,
    )


def _charlm() -> Problem:
    codes = torch.randint(CHARLM_VOCABULARY, (CHARLM_BATCH, CHARLM_CONTEXT + 1))
    return Problem(
        CharLM(CHARLM_VOCABULARY, CHARLM_CONTEXT, CHARLM_WIDTH, CHARLM_HEADS, CHARLM_LAYERS),
        codes[:, :-1],
        codes[:, 1:].flatten(),
        lambda out: out.flatten(0, 1),
        F.cross_entropy,
        sequences=True,
    )


def _convnet() -> Problem:
    """ResNet-8: one block at each of three widths."""
    first, second, third = CONVNET_WIDTHS
    model = nn.Sequential(
        nn.Conv2d(3, first, 3, padding=1, bias=False),
        nn.BatchNorm2d(first),
        nn.ReLU(),
        ResidualBlock(first, first, 1),
        ResidualBlock(first, second, 2),
        ResidualBlock(second, third, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(third, 10),
    )
    return Problem(
        model, torch.randn(64, 3, 32, 32), torch.randint(10, (64,)), lambda out: out,
        F.cross_entropy,
    )  # fmt: skip


MODELS: Mapping[str, Callable[[], Problem]] = {
    "autoencoder": _autoencoder,
    "charlm": _charlm,
    "convnet": _convnet,
}


def make_problem(name: str, device: str) -> Problem:
    """A model of `MODELS` with its batch, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[name]().to(device)
