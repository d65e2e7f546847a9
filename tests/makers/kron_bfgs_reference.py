"""K-BFGS written down densely, from a layer's rows, in float64.

Letters: n rows (N samples times S positions), I inputs with the bias coordinate, O outputs.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Seen(NamedTuple):
    """What a layer showed of one batch."""

    input_nI: Tensor
    output_nO: Tensor
    grad_nO: Tensor
    positions: int


def observe(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Seen]:
    """Of all Linear and Conv2d layers, by plain hooks on a copy."""
    model = copy.deepcopy(model)
    calls: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(
                lambda _, args, out, name=name: calls.__setitem__(name, (args[0], out))
            )
    x, t = batch
    loss = F.cross_entropy(model(x), t)
    grads = torch.autograd.grad(loss, [out for _, out in calls.values()])
    return {
        name: _rows(model.get_submodule(name), input, out, grad)
        for (name, (input, out)), grad in zip(calls.items(), grads, strict=True)
    }


def _rows(module: nn.Module, input: Tensor, out: Tensor, grad: Tensor) -> Seen:
    samples = len(input)
    if isinstance(module, nn.Conv2d):
        input = F.unfold(
            input, module.kernel_size, padding=module.padding, stride=module.stride
        ).transpose(1, 2)
        out, grad = (x.flatten(2).transpose(1, 2) for x in (out, grad))
    rows = [x.reshape(-1, x.shape[-1]).detach() for x in (input, out, grad)]
    if module.bias is not None:
        rows[0] = torch.cat([rows[0], torch.ones(len(rows[0]), 1, dtype=rows[0].dtype)], 1)
    return Seen(*rows, len(rows[0]) // samples)


def bfgs(h: Tensor, s: Tensor, y: Tensor) -> Tensor:
    rho = 1 / (s @ y)
    left = torch.eye(len(h), dtype=h.dtype) - rho * torch.outer(s, y)
    return left @ h @ left.mT + rho * torch.outer(s, s)


@dataclass
class Reference:
    """One layer; ``step``, then ``moved`` after the optimizer's step."""

    damping: float
    decay: float | None
    minibatch: bool = False
    mu1: float = 0.2
    data_size: int | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    before: Seen | None = None

    def step(self, seen: Seen, *, curvature: bool = True, update: bool = True) -> None:
        rows, positions = seen.input_nI, seen.positions
        identity = torch.eye(rows.shape[1], dtype=rows.dtype)
        size = self.data_size or len(rows) / positions
        batch = rows.mT @ rows / size
        if curvature:
            self._average("A", batch)
        a = batch if self.minibatch else self.state["A"]
        damped = a + (self.damping * positions) ** 0.5 * identity
        if update:
            h = self.state.get("H_a", torch.linalg.inv(damped))
            s = h @ rows.mean(0)
            self.state["H_a"] = bfgs(h, s, damped @ s)
            self.state["last_s"], self.state["last_y"] = s, damped @ s
        self.state.setdefault("H_g", torch.eye(seen.output_nO.shape[1], dtype=rows.dtype))
        self.before = seen if update else None

    def moved(self, after: Seen) -> None:
        if self.before is None:
            return
        positions = after.positions
        s = after.output_nO.mean(0) - self.before.output_nO.mean(0)
        y = (after.grad_nO.sum(0) - self.before.grad_nO.sum(0)) / positions
        if y.norm() < 1e-13 * after.grad_nO.abs().sum():  # in front of a BatchNorm: it is zero
            y = torch.zeros_like(y)
        if self.decay is not None:
            # From zero on.
            for key, value in (("s", s), ("y", y)):
                old = self.state.get(key, torch.zeros_like(value))
                self.state[key] = (1 - self.decay) * old + self.decay * value
            s, y = self.state["s"], self.state["y"]
        h = self.state["H_g"]
        hy = h @ y
        theta = 1.0
        if s @ y < self.mu1 * (y @ hy):
            theta = float((1 - self.mu1) * (y @ hy) / (y @ hy - s @ y))
        s = theta * s + (1 - theta) * hy
        self.state["H_g"] = bfgs(h, s, y + (self.damping / positions) ** 0.5 * s)
        self.before = None

    def _average(self, key: str, new: Tensor) -> None:
        old = self.state.get(key)
        if old is None or self.decay is None:
            self.state[key] = new
        else:
            self.state[key] = (1 - self.decay) * old + self.decay * new
