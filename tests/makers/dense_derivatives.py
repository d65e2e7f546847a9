"""Dense derivatives by loops over plain autograd, float64: what products are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def row(value: Tensor, params: Sequence[Tensor], graph: bool = False) -> Tensor:
    """The gradient [P] of one number."""
    if not value.requires_grad:
        return torch.zeros(sum(p.numel() for p in params))
    found = torch.autograd.grad(
        value, params, retain_graph=True, create_graph=graph, allow_unused=True
    )
    return flat(
        [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]
    )


def jacobian(values: Tensor, params: Sequence[Tensor]) -> Tensor:
    """[K, P] of K values."""
    return torch.stack([row(value, params) for value in values.reshape(-1)])


def hessian(loss: Tensor, params: Sequence[Tensor]) -> Tensor:
    """[P, P]."""
    return jacobian(row(loss, params, graph=True), params)


def sample_gradients(
    loss_of: Callable[[int], Tensor], samples: int, params: list[Tensor]
) -> Tensor:
    """[N, P]: of the losses of single samples."""
    return torch.stack([row(loss_of(n), params).detach() for n in range(samples)])


def fisher(logits: Tensor, J: Tensor, loss_type: str, size: int) -> Tensor:
    """Σ_n J_nᵀ H_n J_n / size of logits [N, C] with their Jacobian [N*C, P]: [P, P]."""
    total = torch.zeros(J.shape[1], J.shape[1])
    for n, z in enumerate(logits.detach()):
        p = torch.softmax(z, 0)
        H = torch.diag(p) - torch.outer(p, p) if loss_type == "cross_entropy" else torch.eye(len(z))
        J_n = J.reshape(len(logits), len(z), -1)[n]
        total += J_n.T @ H @ J_n
    return total / size
