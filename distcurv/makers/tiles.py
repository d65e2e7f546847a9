"""Tiles: a parameter cut into pieces of at most ``block_size`` along each dimension.

Each tile is a block of its own, as in Anil et al. 2020, "Scalable Second Order Optimization for
Deep Learning", section 3.4: two small factors cost less than one large one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """A piece of a parameter.

    Attributes:
        name: of its block.
        param: the whole parameter.
        view: the shape that the parameter is seen in.
        cut: which part of that it is, a range for each dimension.
    """

    name: str
    param: Tensor = field(repr=False)
    view: tuple[int, ...]
    cut: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tile."""
        return tuple(stop - start for start, stop in self.cut)

    def of(self, tensor: Tensor) -> Tensor:
        """The tile's part of a tensor of the parameter's shape; a view where that is possible."""
        return tensor.reshape(self.view)[tuple(slice(*part) for part in self.cut)]


def tiles_of(name: str, param: Tensor, view: Sequence[int], block_size: int | None) -> list[Tile]:
    """The tiles of a parameter seen in the shape ``view``; one for all of it without a size."""
    ranges = [list(_cuts(size, block_size)) for size in view]
    tiles = []
    whole = all(len(of_dim) == 1 for of_dim in ranges)
    for cut in itertools.product(*ranges):
        part = "" if whole else f"[{','.join(f'{start}:{stop}' for start, stop in cut)}]"
        tiles.append(Tile(name + part, param, tuple(view), cut))
    return tiles


def _cuts(size: int, block_size: int | None) -> Iterator[tuple[int, int]]:
    step = size if block_size is None else block_size
    for start in range(0, size, step):
        yield start, min(start + step, size)
