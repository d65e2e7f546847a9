"""Which parameters an optimizer treats as matrices, and the block each of them becomes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from distcurv.config import ServiceConfig
from distcurv.curvature.spec import SIDE_NAMES, BlockSpec, SideSpec
from distcurv.curvature.statistics import resolve_encoding
from distcurv.errors import ConfigError
from distcurv.layers.local_part import Cut, Span, own_part, parameter_cut


@dataclass(frozen=True)
class Matrix:
    """A parameter seen as a matrix [Do, Di]; a convolution's weight keeps dimension 0."""

    name: str
    param: Tensor = field(repr=False)
    shape: tuple[int, int]

    @property
    def rows(self) -> Span | None:
        """The rows that this rank holds; None for all of them."""
        return None

    def view(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape as the matrix [Do, Di]."""
        return tensor.reshape(self.shape)


@dataclass(frozen=True)
class ShardedMatrix(Matrix):
    """A parameter of which `fully_shard` has left this rank some rows; ``shape`` is the whole's."""

    cut: Cut = field(repr=False)

    @property
    def rows(self) -> Span:
        """The rows that this rank holds; may be none."""
        return self.cut.own

    def view(self, tensor: Tensor) -> Tensor:
        """This rank's rows of a DTensor of the parameter's shape, as a matrix [o, Di]."""
        start, stop = self.rows
        return own_part(tensor).reshape(stop - start, self.shape[1])


def matrix_shape(param: Tensor) -> tuple[int, int] | None:
    """[Do, Di] of a parameter that is worth a basis, None for vectors and degenerate shapes."""
    if param.dim() < 2 or param.numel() == 0:
        return None
    shape = (param.shape[0], param.numel() // param.shape[0])
    return shape if min(shape) > 1 else None


def find_matrices(named: Iterable[tuple[str, Tensor]]) -> list[Matrix]:
    """The matrices among named parameters, in order.

    Raises `ConfigError` for one that is sharded in another way than `fully_shard` does."""
    found: list[Matrix] = []
    for name, param in named:
        shape = matrix_shape(param)
        if not param.requires_grad or shape is None:
            continue
        cut = parameter_cut(param)
        if cut is None:
            found.append(Matrix(name, param, shape))
        else:
            found.append(ShardedMatrix(name, param, shape, cut))
    return found


def matrix_spec(matrix: Matrix, config: ServiceConfig) -> BlockSpec:
    """The low-rank block of a matrix: isotropic tails, the full basis on sides with d <= r.

    Side G of a sharded one is a sketch, which parts of the gradient can add up to; `ConfigError`
    where the config asks for another encoding."""
    sharded = matrix.rows is not None
    if sharded and config.encoding == "dense":
        raise ConfigError(
            f"encoding is 'dense' and the parameter {matrix.name} is sharded: a dense statistic of "
            "the output side needs the whole gradient; use encoding='auto' or 'sketch'"
        )
    sides = []
    for name, dim in zip(SIDE_NAMES, (matrix.shape[1], matrix.shape[0]), strict=True):
        rank = min(config.rank, dim)
        wanted = "sketch" if sharded and name == "G" else config.encoding
        encoding = resolve_encoding(dim, rank, "isotropic", wanted)
        sides.append(SideSpec(dim, rank, "isotropic", encoding))
    return BlockSpec(
        matrix.name,
        "lowrank",
        tuple(sides),
        config.factor_decay,
        wire_dtype=config.wire_dtype,
    )
