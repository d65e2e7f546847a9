"""Dense float64 references, written from the formulas and not from the code under test.

Slow and plain on purpose: loops, explicit d x d matrices, `torch.linalg.solve`, `torch.kron`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthonormal(d: int, r: int, seed: int, batch: tuple[int, ...] = ()) -> Tensor:
    """Random orthonormal columns, float64 [*batch, d, r]."""
    random = torch.randn(*batch, d, r, generator=generator(seed), dtype=torch.float64)
    return torch.linalg.qr(random).Q


def psd(spectrum: Sequence[float], seed: int) -> Tensor:
    """Symmetric positive semidefinite [d, d] float64 with the given eigenvalues."""
    lam = torch.tensor(list(spectrum), dtype=torch.float64)
    U = orthonormal(len(lam), len(lam), seed)
    return (U * lam) @ U.mT


def root_of(matrix: Tensor) -> Tensor:
    """Rows X [d, d] with XᵀX = matrix."""
    lam, U = torch.linalg.eigh(matrix)
    return lam.clamp(min=0).sqrt().unsqueeze(-1) * U.mT


def triangle(matrix: Tensor) -> list[float]:
    """The upper triangle by rows, entry by entry."""
    d = matrix.shape[-1]
    return [matrix[i, j].item() for i in range(d) for j in range(i, d)]


def symmetric(packed: Tensor, d: int) -> Tensor:
    """The matrix of a packed triangle, entry by entry, float64."""
    matrix = torch.zeros(d, d, dtype=torch.float64)
    values = iter(packed.tolist())
    for i in range(d):
        for j in range(i, d):
            matrix[i, j] = matrix[j, i] = next(values)
    return matrix


def averaged(decay: float, arrivals: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Bias-corrected EMA of (n steps, their mean), as one weighted sum over single steps."""
    steps = [mean.double() for n, mean in arrivals for _ in range(n)]
    weights = [decay ** (len(steps) - 1 - i) for i in range(len(steps))]
    total = sum(weight * step for weight, step in zip(weights, steps, strict=True))
    return torch.as_tensor(total) / sum(weights)


def low_rank_matrix(U: Tensor, lam: Tensor, tail: Tensor | None) -> Tensor:
    """U diag(lam − t) Uᵀ + t I, U diag(lam) Uᵀ + diag(res) or U diag(lam) Uᵀ, [d, d] float64."""
    d = U.shape[0]
    U, lam = U.double(), lam.double()
    if tail is None:
        return U @ torch.diag(lam) @ U.mT
    tail = tail.double()
    if tail.shape[0] == d:
        return U @ torch.diag(lam) @ U.mT + torch.diag(tail)
    return U @ torch.diag(lam - tail) @ U.mT + tail * torch.eye(d, dtype=torch.float64)


def nystrom_matrix(A: Tensor, Q: Tensor) -> Tensor:
    """A Q (QᵀAQ)⁺ QᵀA, [d, d] float64."""
    Y = A.double() @ Q.double()
    return Y @ torch.linalg.pinv(Q.double().mT @ Y, hermitian=True) @ Y.mT


def best_rank(matrix: Tensor, r: int) -> Tensor:
    """The nearest matrix of rank r to a symmetric positive semidefinite one."""
    lam, U = torch.linalg.eigh(matrix)
    return (U[:, -r:] * lam[-r:]) @ U[:, -r:].mT


def kronecker_solve(A: Tensor, G: Tensor, grad: Tensor) -> Tensor:
    """(A ⊗ G)⁻¹ vec(grad) with vec stacking columns, as a matrix [Do, Di] float64."""
    vec = grad.double().mT.reshape(-1)
    solved = torch.linalg.solve(torch.kron(A.double(), G.double()), vec)
    return solved.reshape(grad.shape[1], grad.shape[0]).mT


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """‖got − wanted‖ / ‖wanted‖ (Frobenius), or ‖got‖ where nothing is wanted."""
    size = wanted.double().norm()
    return ((got.double() - wanted.double()).norm() / (size if size > 0 else 1.0)).item()


def orthogonality_error(U: Tensor) -> float:
    """Largest entry of |UᵀU − I|."""
    gram = U.double().mT @ U.double()
    return (gram - torch.eye(gram.shape[-1], dtype=torch.float64)).abs().max().item()
