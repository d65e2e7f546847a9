"""Low-rank adapters around a frozen Linear: the adapters alone are preconditioned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distcurv import KfacConfig, LowRankSOAP, Preconditioner

N, INPUTS, OUTPUTS, RANK, DAMPING = 12, 5, 4, 3, 0.1


class LoRALinear(nn.Module):
    """A frozen Linear with a trained product of two thin matrices beside it (Hu et al. 2021)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float = 8.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.up(self.down(x))


class BareLoRALinear(nn.Module):
    """The same with bare parameters, as some libraries have it."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float = 8.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / 2)
        self.up = nn.Parameter(torch.randn(base.out_features, rank) / 2)
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * F.linear(F.linear(x, self.down), self.up)


def wrapped(kind: type[nn.Module]) -> tuple[nn.Module, Tensor, Tensor]:
    """A wrapped Linear, inputs and targets."""
    torch.manual_seed(0)
    model = kind(nn.Linear(INPUTS, OUTPUTS), RANK)
    return model, torch.randn(N, INPUTS), torch.arange(N) % OUTPUTS


def weights(model: nn.Module) -> tuple[Tensor, Tensor]:
    """down and up."""
    return tuple(p for p in model.parameters() if p.requires_grad)  # type: ignore[return-value]


def expected(model: nn.Module, x: Tensor, target: Tensor) -> list[Tensor]:
    """(A + ..)⁻¹ ⊗ (G + ..)⁻¹ of the batch on both gradients, by hand in float64."""
    base = model.get_submodule("base")
    W, b = (p.double() for p in (base.weight, base.bias))  # type: ignore[union-attr, operator]
    down, up = (w.detach().double() for w in weights(model))
    scale, x = 8.0 / RANK, x.double()
    hidden = x @ down.T
    g = F.softmax(x @ W.T + b + scale * hidden @ up.T, -1) - F.one_hot(target, OUTPUTS)
    g_up = scale * g
    results = []
    for a, g_out in ((x, g_up @ up), (hidden, g_up)):
        A, G = a.T @ a / N, g_out.T @ g_out / N
        pi = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
        A = A + DAMPING**0.5 * pi * torch.eye(len(A))
        G = G + DAMPING**0.5 / pi * torch.eye(len(G))
        grad = g_out.T @ a / N
        results.append(torch.linalg.solve(G, grad) @ torch.linalg.inv(A))
    return results


@pytest.mark.parametrize("block_kind", ["dense", "lowrank"])
@pytest.mark.parametrize("kind", [LoRALinear, BareLoRALinear])
def test_a_step_is_the_kronecker_inverse_of_the_adapters(
    kind: type[nn.Module], block_kind: str
) -> None:
    """Tolerance: float32 against float64."""
    model, x, target = wrapped(kind)
    wanted = expected(model, x, target)
    config = KfacConfig(
        kind=block_kind,
        damping=DAMPING,
        preconditioner_upd_interval=1,
        early_steps=100,
    )
    with Preconditioner(model, config, workers="inline") as precond:
        assert precond.block_names == ["down", "up"]
        assert not precond.uncovered
        F.cross_entropy(model(x), target).backward()
        precond.step()
    for weight, value in zip(weights(model), wanted, strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad.double(), value, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in model.get_submodule("base").parameters())


@pytest.mark.parametrize("source", ["gradient", "activations"])
@pytest.mark.parametrize("kind", [LoRALinear, BareLoRALinear])
def test_lowranksoap_trains_the_adapters_alone(kind: type[nn.Module], source: str) -> None:
    model, x, target = wrapped(kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    with LowRankSOAP(model, lr=0.03, rank=2, source=source, workers="inline") as optimizer:
        for _ in range(10):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert all("base" not in name for name in optimizer.block_names)
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) is name.startswith("base"), name
