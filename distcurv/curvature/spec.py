"""What a block is, in numbers: the contract that ranks and workers share.

A `BlockSpec` says which sides a block has, how each side's statistic is encoded and which kind
refreshes it.  A `Layout` turns the named tensors of a statistic or of a preconditioner into one
flat float32 buffer and back, so that buckets, broadcasts and frames depend on shapes only; it also
says which of them travel between owners and workers as float16 (see `distcurv.curvature.narrow`).

Letters: B blocks of one shape, d a side's dimension, r its rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distcurv.errors import ShapeError

TAILS = ("none", "isotropic", "diagonal")
RANKLESS = ("diagonal", "unit")  # encodings of factors that have no basis
ENCODINGS = ("sketch", "dense", *RANKLESS)
WIRE_DTYPES = ("float32", "float16")
SIDE_NAMES = ("A", "G")  # input side, output side: prefixes of the names in a layout
ONE_SIDE = "F"  # the prefix where a block has one side alone
MOST_SIDES = 8  # of a tensor of more than two dimensions: one side for each, M0, M1, ...
MOST_PRODUCTS = 10_000  # in one refresh: a worker has others to serve

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class SideSpec:
    """One Kronecker side, or the whole of a block that has one side alone.

    Attributes:
        dim: the side's dimension d (with the bias coordinate where there is one).  Of a block with
            one side: how many parameters it has, or for ``unit`` how many units.
        rank: r of the published basis, 1 <= r <= d.  Equal to ``dim`` for the full basis; 0 where
            the encoding is ``diagonal`` or ``unit``, and only there.
        tail: what stands for the part outside the basis: ``none | isotropic | diagonal``.
        encoding: how the statistic travels: ``sketch`` (d x r), ``dense`` (packed triangle),
            ``diagonal`` (d: the factor is a diagonal) or ``unit`` (3 d: one symmetric 2 x 2 matrix
            for each unit's weight and bias); the last two with the tail ``diagonal``.
        units: how many matrices of this dimension stand on the diagonal of the factor, each of its
            own; other than 1 only for the kind ``unit_rows``.
    """

    dim: int
    rank: int
    tail: str = "isotropic"
    encoding: str = "sketch"
    units: int = 1

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ShapeError(f"SideSpec.dim is {self.dim}: a side needs at least one dimension")
        if self.units < 1 or (self.units > 1 and self.encoding != "dense"):
            raise ShapeError(
                f"SideSpec has {self.units} units and encoding {self.encoding!r}: give one, or "
                f"several with the encoding 'dense'"
            )
        if self.tail not in TAILS:
            raise ShapeError(f"SideSpec.tail is {self.tail!r}: use one of {', '.join(TAILS)}")
        if self.encoding not in ENCODINGS:
            raise ShapeError(
                f"SideSpec.encoding is {self.encoding!r}: use one of {', '.join(ENCODINGS)}"
            )
        if self.encoding in RANKLESS:
            if self.rank != 0 or self.tail != "diagonal":
                raise ShapeError(
                    f"SideSpec has encoding {self.encoding!r} with rank {self.rank} and tail "
                    f"{self.tail!r}: such a side has no basis, give rank 0 and tail 'diagonal'"
                )
        elif not 1 <= self.rank <= self.dim:
            raise ShapeError(
                f"SideSpec.rank is {self.rank} for dim {self.dim}: give a rank from 1 to dim"
            )


@dataclass(frozen=True)
class BlockSpec:
    """One preconditioned unit, as ranks and workers both know it.

    Attributes:
        name: unique in its table, normally the parameter's or the layer's name.
        kind: key into `distcurv.curvature.kinds.KINDS`.
        sides: input side A first, then output side G; or one side F, for the block as a whole; or
            three to eight, M0, M1, ..., one for each dimension of a tensor, in order.
        decay: the factor's EMA decay rho per statistic step, 0 <= rho <= 1; 1 forgets nothing: the
            mean of all statistics, of which the weight is the number.
        damping: delta; used by kinds whose refresh needs it (dense), else read on the ranks.
        relative_damping: damping is a multiple of the mean eigenvalue instead of absolute.
        power: what the inverse of each side's damped factor is raised to, > 0; other than 1 for
            the kind ``shampoo`` alone.
        max_itr: products with a dense factor in one refresh of kind ``lowrank``, at most; 0: one,
            and two for the first version.
        tolerance: they end where the basis moves by less, see `power_eigenpairs`.
        wire_dtype: what sketches and bases of kind ``lowrank`` travel as between owners and
            workers: ``float32 | float16``.  All other numbers, other encodings and other kinds
            travel as float32 whatever it says.
    """

    name: str
    kind: str
    sides: tuple[SideSpec, ...]
    decay: float
    damping: float = 0.0
    relative_damping: bool = False
    power: float = 1.0
    max_itr: int = 0
    tolerance: float = 0.0
    wire_dtype: str = "float32"

    def __post_init__(self) -> None:
        if not 1 <= len(self.sides) <= MOST_SIDES:
            raise ShapeError(
                f"BlockSpec {self.name!r} has {len(self.sides)} sides: give the input side A and "
                f"the output side G, one side for the block as a whole, or one for each dimension "
                f"of a tensor, {MOST_SIDES} at most"
            )
        if len(self.sides) > 1 and any(side.encoding == "unit" for side in self.sides):
            raise ShapeError(
                f"BlockSpec {self.name!r} has several sides, one of encoding 'unit': that encoding "
                f"is for blocks with one side"
            )
        if len(self.sides) > 1 and any(side.units > 1 for side in self.sides):
            raise ShapeError(
                f"BlockSpec {self.name!r} has several sides, one of several units: those are for "
                f"blocks with one side"
            )
        if not 0.0 <= self.decay <= 1.0:
            raise ShapeError(
                f"BlockSpec {self.name!r} has decay {self.decay}: give 0 <= decay <= 1"
            )
        if not 0.0 < self.power < math.inf:
            raise ShapeError(f"BlockSpec {self.name!r} has power {self.power}: give a number > 0")
        if not 0 <= self.max_itr <= MOST_PRODUCTS or not 0.0 <= self.tolerance < math.inf:
            raise ShapeError(
                f"BlockSpec {self.name!r} has max_itr {self.max_itr} and tolerance "
                f"{self.tolerance}: give numbers >= 0, max_itr at most {MOST_PRODUCTS}"
            )
        if self.wire_dtype not in WIRE_DTYPES:
            raise ShapeError(
                f"BlockSpec {self.name!r} has wire_dtype {self.wire_dtype!r}: use one of "
                f"{', '.join(WIRE_DTYPES)}"
            )

    def named_sides(self) -> Iterator[tuple[str, SideSpec]]:
        """The sides with their prefixes: A before G, F where there is one side, or M0, M1, ..."""
        count = len(self.sides)
        names: tuple[str, ...] = tuple(f"M{i}" for i in range(count))
        if count <= len(SIDE_NAMES):
            names = SIDE_NAMES if count > 1 else (ONE_SIDE,)
        return zip(names, self.sides, strict=True)

    def shape_key(self) -> tuple[object, ...]:
        """What must be equal for blocks to be refreshed in one batched call."""
        return (
            self.kind,
            self.sides,
            self.decay,
            self.damping,
            self.relative_damping,
            self.power,
            self.max_itr,
            self.tolerance,
            self.wire_dtype,
        )

    def to_fields(self) -> dict[str, object]:
        """Plain maps and lists, for a message."""
        fields = dataclasses.asdict(self)
        fields["sides"] = [dataclasses.asdict(side) for side in self.sides]
        return fields


class Layout:
    """Names and shapes of tensors that make one flat float32 buffer, in a fixed order.

    ``narrow`` names those that travel between owners and workers as float16; ``nbytes`` is what
    all of them take on that way."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], narrow: Iterable[str] = ()) -> None:
        self.shapes: dict[str, tuple[int, ...]] = dict(shapes)
        self.offsets: dict[str, int] = {}
        position = 0
        for name, shape in self.shapes.items():
            self.offsets[name] = position
            position += math.prod(shape)
        self.size = position
        self.narrow = frozenset(narrow)
        self.narrow_size = sum(math.prod(self.shapes[name]) for name in self.narrow)
        self.columns = sum(self.shapes[name][-1] for name in self.narrow)  # each with a scale
        self.nbytes = 4 * (self.size + self.columns) - 2 * self.narrow_size

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
