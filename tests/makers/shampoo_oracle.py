"""Shampoo written out densely in float64, from the paper's formulas, not from the code under test.

Gupta et al. 2018: H_i = sum of X_(i) X_(i)^T over the gradients (or their average), the direction
is X times (H_i + damping I)^(-1/2k) along each of its k dimensions.  Explicit matrices,
eigenvalues, one einsum for each dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LETTERS = "abcdefg"


def power(matrix: Tensor, exponent: float) -> Tensor:
    """A symmetric positive definite matrix raised to a power."""
    lam, U = torch.linalg.eigh(matrix)
    return U @ torch.diag(lam**exponent) @ U.T


def along(tensor: Tensor, matrix: Tensor, dim: int) -> Tensor:
    """Dimension ``dim`` of a tensor multiplied with a matrix."""
    letters = LETTERS[: tensor.dim()]
    out = letters.replace(letters[dim], "z")
    return torch.einsum(f"{letters},z{letters[dim]}->{out}", tensor, matrix)


class DenseShampoo:
    """One tensor (or tile) of k dimensions; of a vector the diagonal form.

    ``weight`` is that of a new statistic, None for the sum.
    """

    def __init__(
        self,
        shape: Sequence[int],
        damping: float,
        *,
        weight: float | None = None,
        exponent: float | None = None,
        relative: bool = False,
    ) -> None:
        self.k = len(shape)
        self.damping, self.weight, self.relative = damping, weight, relative
        self.exponent = -1 / (2 * self.k) if exponent is None else exponent
        self.statistics = [torch.zeros(d, d, dtype=torch.float64) for d in shape]
        self.steps = 0
        self.roots: list[Tensor] = []

    def take(self, grad: Tensor) -> None:
        """Accumulate a gradient's statistics."""
        grad = grad.double()
        self.steps += 1
        for i, old in enumerate(self.statistics):
            rows = grad.movedim(i, 0).reshape(len(old), -1)
            new = rows @ rows.T if self.k > 1 else torch.diag(grad**2)
            if self.weight is None:
                self.statistics[i] = old + new
            else:
                self.statistics[i] = (1 - self.weight) * old + self.weight * new

    def update(self) -> None:
        """Make the roots of what there is."""
        self.roots = []
        for statistic in self.statistics:
            matrix = statistic
            if self.weight is not None:  # the average's weights are made to add up to 1
                matrix = matrix / (1 - (1 - self.weight) ** self.steps)
            damping = self.damping
            if self.relative:
                damping = damping * matrix.trace().item() / len(matrix)
            self.roots.append(power(matrix + damping * torch.eye(len(matrix)), self.exponent))

    def direction(self, grad: Tensor) -> Tensor:
        """The gradient times all roots."""
        made = grad.double()
        for i, root in enumerate(self.roots):
            made = along(made, root, i)
        return made
