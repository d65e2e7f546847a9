"""K-FAC in float64: factors from autograd's gradients, their torch.kron, solved densely.

A of a layer is the mean of a aᵀ over its rows (with the bias coordinate), G the sum of g gᵀ over
them divided by the number of terms, g being the gradient of the summed loss.  Embeddings have the
relative frequencies for A.  Norms get for each unit the 2 x 2 matrix of per-sample gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Summed = Callable[[Tensor], Tensor]  # logits -> the sum of the loss's terms
Factors = dict[str, tuple[Tensor, Tensor]]


def doubled(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def layers(model: nn.Module) -> dict[str, Any]:
    kinds = (nn.Linear, nn.Conv2d, nn.Embedding)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def norms(model: nn.Module) -> dict[str, Any]:
    kinds = (nn.LayerNorm, nn.BatchNorm2d)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def factors(model: nn.Module, x: Tensor, summed: Summed, terms: float) -> Factors:
    """(A, G) of each layer of a float64 model."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name, module in layers(model).items():

        def remember(module: nn.Module, args: Any, out: Tensor, name: str = name) -> None:
            seen[name] = (args[0], out)

        handles.append(module.register_forward_hook(remember))
    loss = summed(model(x))
    for handle in handles:
        handle.remove()
    grads = torch.autograd.grad(loss, [out for _, out in seen.values()])
    found = {}
    for (name, (given, _)), grad in zip(seen.items(), grads, strict=True):
        module = layers(model)[name]
        a, g = rows(module, given, grad)
        found[name] = (a.T @ a / len(a), g.T @ g / terms)
    return found


def rows(module: Any, given: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(module, nn.Embedding):
        one_hot = F.one_hot(given.flatten(), module.num_embeddings).double()
        return one_hot, grad.reshape(-1, grad.shape[-1])
    if isinstance(module, nn.Conv2d):
        a = F.unfold(given, module.kernel_size, padding=module.padding, stride=module.stride)  # type: ignore[arg-type]
        a = a.transpose(1, 2).reshape(-1, a.shape[1])
        g = grad.flatten(2).transpose(1, 2).reshape(-1, grad.shape[1])
    else:
        a, g = given.reshape(-1, given.shape[-1]), grad.reshape(-1, grad.shape[-1])
    if module.bias is not None:
        a = torch.cat([a, torch.ones_like(a[:, :1])], 1)
    return a, g


def unit_squares(model: nn.Module, x: Tensor, summed: Callable[[Tensor, int], Tensor]) -> Any:
    """By norm, sum over samples of [gw, gb][gw, gb]ᵀ for each unit, [d, 2, 2].

    ``summed(logits, n)``: the terms of sample n."""
    totals: dict[str, Tensor] = {}
    for n in range(len(x)):
        for name, module in norms(model).items():
            loss = summed(model(x[n : n + 1]), n)
            g = torch.stack(torch.autograd.grad(loss, [module.weight, module.bias]), 1)
            outer = g.unsqueeze(2) * g.unsqueeze(1)
            totals[name] = totals[name] + outer if name in totals else outer
    return totals


def matrix_of(module: Any, grads: dict[str, Tensor], name: str) -> Tensor:
    """A gradient as [O, I], the bias last."""
    weight = grads[f"{name}.weight"].double()
    if isinstance(module, nn.Embedding):
        return weight.T
    weight = weight.flatten(1)
    if module.bias is not None:
        weight = torch.cat([weight, grads[f"{name}.bias"].double().unsqueeze(1)], 1)
    return weight


def solved(A: Tensor, G: Tensor, grad: Tensor, damping: float, scale: float = 1.0) -> Tensor:
    """((A + π√δ I) ⊗ (s G + √δ/π I))⁻¹ vec(grad), π² = (tr A/d_A)/(tr s G/d_G)."""
    G = scale * G
    pi = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
    A = A + damping**0.5 * pi * torch.eye(len(A), dtype=torch.float64)
    G = G + damping**0.5 / pi * torch.eye(len(G), dtype=torch.float64)
    return torch.linalg.solve(torch.kron(G, A), grad.flatten()).view_as(grad)


def units_solved(squares: Tensor, grads: dict[str, Tensor], name: str, damping: float) -> Tensor:
    """By unit (M + damping I)⁻¹ [gw, gb], [d, 2]."""
    g = torch.stack([grads[f"{name}.weight"], grads[f"{name}.bias"]], 1).double()
    damped = squares + damping * torch.eye(2, dtype=torch.float64)
    return torch.linalg.solve(damped, g.unsqueeze(-1)).squeeze(-1)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())
