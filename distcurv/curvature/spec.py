"""What a block is, in numbers: the contract that ranks and workers share.

A `BlockSpec` says which sides a block has, how each side's statistic is encoded and which kind
refreshes it.  A `Layout` turns the named tensors of a statistic or of a preconditioner into one
flat float32 buffer and back, so that buckets, broadcasts and frames depend on shapes only.

Letters: B blocks of one shape, d a side's dimension, r its rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distcurv.errors import ShapeError

TAILS = ("none", "isotropic", "diagonal")
ENCODINGS = ("sketch", "dense")
SIDE_NAMES = ("A", "G")  # input side, output side: prefixes of the names in a layout

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class SideSpec:
    """One Kronecker side.

    Attributes:
        dim: the side's dimension d (with the bias coordinate where there is one).
        rank: r of the published basis, 1 <= r <= d.  Equal to ``dim`` for the full basis.
        tail: what stands for the part outside the basis: ``none | isotropic | diagonal``.
        encoding: how the statistic travels: ``sketch`` (d x r) or ``dense`` (packed triangle).
    """

    dim: int
    rank: int
    tail: str = "isotropic"
    encoding: str = "sketch"

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ShapeError(f"SideSpec.dim is {self.dim}: a side needs at least one dimension")
        if not 1 <= self.rank <= self.dim:
            raise ShapeError(
                f"SideSpec.rank is {self.rank} for dim {self.dim}: give a rank from 1 to dim"
            )
        if self.tail not in TAILS:
            raise ShapeError(f"SideSpec.tail is {self.tail!r}: use one of {', '.join(TAILS)}")
        if self.encoding not in ENCODINGS:
            raise ShapeError(
                f"SideSpec.encoding is {self.encoding!r}: use one of {', '.join(ENCODINGS)}"
            )


@dataclass(frozen=True)
class BlockSpec:
    """One preconditioned unit, as ranks and workers both know it.

    Attributes:
        name: unique in its table, normally the parameter's or the layer's name.
        kind: key into `distcurv.curvature.kinds.KINDS`.
        sides: input side A first, then output side G.
        decay: the factor's EMA decay rho per statistic step, 0 <= rho < 1.
        damping: delta; used by kinds whose refresh needs it (dense), else read on the ranks.
        relative_damping: damping is a multiple of the mean eigenvalue instead of absolute.
    """

    name: str
    kind: str
    sides: tuple[SideSpec, ...]
    decay: float
    damping: float = 0.0
    relative_damping: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.sides) <= len(SIDE_NAMES):
            raise ShapeError(
                f"BlockSpec {self.name!r} has {len(self.sides)} sides: give the input side A, "
                f"or the input side A and the output side G"
            )
        if not 0.0 <= self.decay < 1.0:
            raise ShapeError(f"BlockSpec {self.name!r} has decay {self.decay}: give 0 <= decay < 1")

    def named_sides(self) -> Iterator[tuple[str, SideSpec]]:
        """The sides with their prefixes, A before G."""
        return zip(SIDE_NAMES[: len(self.sides)], self.sides, strict=True)

    def shape_key(self) -> tuple[object, ...]:
        """What must be equal for blocks to be refreshed in one batched call."""
        return (self.kind, self.sides, self.decay, self.damping, self.relative_damping)

    def to_fields(self) -> dict[str, object]:
        """Plain maps and lists, for a message."""
        fields = dataclasses.asdict(self)
        fields["sides"] = [dataclasses.asdict(side) for side in self.sides]
        return fields


class Layout:
    """Names and shapes of tensors that travel as one flat float32 buffer, in a fixed order."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = dict(shapes)
        self.offsets: dict[str, int] = {}
        position = 0
        for name, shape in self.shapes.items():
            self.offsets[name] = position
            position += math.prod(shape)
        self.size = position

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def views(self, flat: Tensor) -> Tensors:
        """Views into ``flat`` ([..., size]) by name; leading batch dimensions are kept."""
        if flat.shape[-1:] != (self.size,):
            raise ShapeError(
                f"Layout.views got a buffer of shape {tuple(flat.shape)}: "
                f"its last dimension must be {self.size} for {list(self.shapes)}"
            )
        lead = flat.shape[:-1]
        out: Tensors = {}
        for name, shape in self.shapes.items():
            start = self.offsets[name]
            out[name] = flat[..., start : start + math.prod(shape)].view((*lead, *shape))
        return out

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """One flat float32 buffer [..., size] from named tensors (one leading batch shape)."""
        first = next(iter(self.shapes))
        lead = tensors[first].shape[: tensors[first].dim() - len(self.shapes[first])]
        flat = torch.empty(*lead, self.size, dtype=torch.float32, device=tensors[first].device)
        for name, view in self.views(flat).items():
            if tensors[name].shape != view.shape:
                raise ShapeError(
                    f"Layout.pack got {name} of shape {tuple(tensors[name].shape)}: "
                    f"the layout says {tuple(view.shape)}"
                )
            view.copy_(tensors[name])
        return flat
