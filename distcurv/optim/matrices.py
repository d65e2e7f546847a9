"""Which parameters an optimizer treats as matrices, and the block each of them becomes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from distcurv.config import ServiceConfig
from distcurv.curvature.spec import BlockSpec, SideSpec
from distcurv.curvature.statistics import resolve_encoding


@dataclass(frozen=True)
class Matrix:
    """A parameter seen as a matrix [Do, Di]; a convolution's weight keeps dimension 0."""

    name: str
    param: Tensor = field(repr=False)
    shape: tuple[int, int]

    def view(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape as the matrix [Do, Di]."""
        return tensor.reshape(self.shape)


def matrix_shape(param: Tensor) -> tuple[int, int] | None:
    """[Do, Di] of a parameter that is worth a basis, None for vectors and degenerate shapes."""
    if param.dim() < 2 or param.numel() == 0:
        return None
    shape = (param.shape[0], param.numel() // param.shape[0])
    return shape if min(shape) > 1 else None


def find_matrices(named: Iterable[tuple[str, Tensor]]) -> list[Matrix]:
    """The matrices among named parameters, in order."""
    found = []
    for name, param in named:
        shape = matrix_shape(param)
        if param.requires_grad and shape is not None:
            found.append(Matrix(name, param, shape))
    return found


def matrix_spec(matrix: Matrix, config: ServiceConfig) -> BlockSpec:
    """The low-rank block of a matrix: isotropic tails, the full basis on sides with d <= r."""
    sides = []
    for dim in (matrix.shape[1], matrix.shape[0]):
        rank = min(config.rank, dim)
        encoding = resolve_encoding(dim, rank, "isotropic", config.encoding)
        sides.append(SideSpec(dim, rank, "isotropic", encoding))
    return BlockSpec(matrix.name, "lowrank", tuple(sides), config.factor_decay)
