"""SOAP written out densely in float64, from the paper's formulas and not from the code under test.

Vyas et al. 2024, "SOAP: Improving and Stabilizing Shampoo using Adam": the factors XᵀX and XXᵀ are
averaged, the gradient's second moment is kept in their eigenbasis, Adam's rule acts there.  The
first basis is that of the eigenvectors, one after the early phase the QR factor of
(factor · basis), Algorithm 4.
Two things are as in distcurv: the average over t gradients is divided by the sum of its weights,
and at a change of the basis the second moments turn by squared rotations.
"""

from __future__ import annotations

import torch
from torch import Tensor


class DenseSoap:
    """One matrix parameter.

    ``weight`` [Do, Di] is copied to float64; ``decay`` is that of the factors.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decay: float = 0.95,
        early: bool = True,
    ) -> None:
        self.weight = weight.detach().double().clone()
        self.lr = lr
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.decay = decay
        self.early = early  # every basis is that of the eigenvectors
        self.steps = 0
        self.arrivals = 0
        d_out, d_in = self.weight.shape
        self.sum_A = torch.zeros(d_in, d_in, dtype=torch.float64)
        self.sum_G = torch.zeros(d_out, d_out, dtype=torch.float64)
        self.momentum = torch.zeros_like(self.weight)
        self.second = torch.zeros_like(self.weight)  # in the eigenbasis
        self.basis_A: Tensor | None = None
        self.basis_G: Tensor | None = None

    def refresh(self, factor_A: Tensor, factor_G: Tensor) -> None:
        """Fold one pair of factors and turn to the eigenbasis of the averages."""
        self.arrivals += 1
        self.sum_A = self.decay * self.sum_A + (1 - self.decay) * factor_A.double()
        self.sum_G = self.decay * self.sum_G + (1 - self.decay) * factor_G.double()
        weights = 1 - self.decay**self.arrivals
        new_A = _next_basis(self.sum_A / weights, None if self.early else self.basis_A)
        new_G = _next_basis(self.sum_G / weights, None if self.early else self.basis_G)
        if self.basis_A is not None and self.basis_G is not None:
            squared_A = (new_A.T @ self.basis_A) ** 2
            squared_G = (new_G.T @ self.basis_G) ** 2
            self.second = squared_G @ self.second @ squared_A.T
        self.basis_A, self.basis_G = new_A, new_G

    def update(self, grad: Tensor) -> None:
        """Adam's rule in the eigenbasis, with decoupled weight decay."""
        assert self.basis_A is not None
        assert self.basis_G is not None
        self.steps += 1
        beta1, beta2 = self.betas
        grad = grad.double()
        self.momentum = beta1 * self.momentum + (1 - beta1) * grad
        turned = self.basis_G.T @ grad @ self.basis_A
        self.second = beta2 * self.second + (1 - beta2) * turned**2
        mean = self.basis_G.T @ self.momentum @ self.basis_A / (1 - beta1**self.steps)
        root = (self.second / (1 - beta2**self.steps)).sqrt() + self.eps
        self.weight *= 1 - self.lr * self.weight_decay
        if self.steps == 1:
            return  # as in the paper's algorithm, the first gradient only makes the basis
        self.weight -= self.lr * (self.basis_G @ (mean / root) @ self.basis_A.T)

    def step(self, grad: Tensor) -> None:
        """Fold this gradient's own factors, then update with the basis that knows it."""
        grad = grad.double()
        self.refresh(grad.T @ grad, grad @ grad.T)
        self.update(grad)


def spread_gradients(shape: tuple[int, int], steps: int, seed: int) -> list[Tensor]:
    """Gradients [Do, Di] whose factors have well separated eigenvalues: an eigenbasis is only as
    well determined as they are, whoever computes it."""
    generator = torch.Generator().manual_seed(seed)
    d_out, d_in = shape
    left = torch.linalg.qr(torch.randn(d_out, d_out, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator)).Q
    scale = torch.zeros(d_out, d_in)
    scale.diagonal().copy_(1.3 ** -torch.arange(min(shape)))
    grads = []
    for _ in range(steps):
        size = 1 + 0.3 * torch.randn(d_in, generator=generator)
        noise = 0.1 * torch.randn(d_out, d_in, generator=generator)
        grads.append(left @ (scale * size + noise) @ right.T)
    return grads


def _next_basis(factor: Tensor, basis: Tensor | None) -> Tensor:
    if basis is None:
        return torch.linalg.eigh(factor).eigenvectors.flip(-1)
    # Directions that no gradient has had keep the order of the old basis.
    lam, vectors = torch.linalg.eigh(factor)
    factor = vectors * lam.clamp_min(1e-6 * float(lam.max())) @ vectors.T
    continued = torch.linalg.qr(factor @ basis)
    return continued.Q * continued.R.diagonal().sign()
