"""Which rows of a parameter this rank holds where `fully_shard` has cut it, and those rows.

FSDP2 cuts dimension 0 of a parameter into contiguous parts as `torch.chunk` does: all of one size
but the last ones, which may be shorter or empty.  With a 2-D mesh (HSDP) the parts repeat along the
mesh's other dimension.  All of it follows from placements and mesh, so nothing is communicated.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from distcurv.errors import ConfigError

Span = tuple[int, int]  # (start, stop)


class Cut(NamedTuple):
    """How dimension 0 of a parameter is divided.

    Attributes:
        size: of the whole dimension.
        parts: ranks that it is divided over.
        place: which part is this rank's.
        group: those ranks.
        replica: which of the equal copies of the whole parameter this rank belongs to; 0 for FSDP.
    """

    size: int
    parts: int
    place: int
    group: dist.ProcessGroup
    replica: int

    @property
    def own(self) -> Span:
        """The rows that this rank holds."""
        return chunk_span(self.size, self.parts, self.place)


def unsharded_type(module: nn.Module) -> type[nn.Module]:
    """The module's class; the one that it had before where `fully_shard` has replaced it."""
    kind = type(module)
    if isinstance(module, FSDPModule) and kind.__bases__[0] is FSDPModule:
        return kind.__bases__[1]
    return kind


def chunk_span(size: int, parts: int, index: int) -> Span:
    """Which rows `torch.chunk` puts into one of ``parts`` parts; none for those that are left."""
    length = -(-size // parts)
    start = min(index * length, size)
    return start, min(start + length, size)


def overlap(span: Span, other: Span) -> Span:
    """The rows in both, counted as they are; an empty span within ``other`` where there is none."""
    start = min(max(span[0], other[0]), other[1])
    return start, max(start, min(span[1], other[1]))


def refuse_placements(parameter: Tensor) -> str | None:
    """Why a DTensor is cut in a way that is not supported; None for others and plain tensors."""
    if not isinstance(parameter, DTensor):
        return None
    mesh, placements = parameter.device_mesh, parameter.placements
    if mesh.get_coordinate() is None:
        return "it is sharded over a device mesh that this rank is no part of"
    cut = [place for place, placement in enumerate(placements) if type(placement) is Shard]
    whole = [place for place, placement in enumerate(placements) if type(placement) is Replicate]
    fits = len(cut) == 1 and len(whole) == len(placements) - 1
    if not fits or not placements[cut[0]].is_shard(0):
        return (
            f"its placements are {tuple(placements)}: only dimension 0 may be sharded, over one "
            "dimension of the mesh (fully_shard does so by default)"
        )
    return None


def parameter_cut(parameter: Tensor) -> Cut | None:
    """How a parameter is divided; None where it is no DTensor.

    Raises `ConfigError` for what `refuse_placements` refuses."""
    if not isinstance(parameter, DTensor):
        return None
    refusal = refuse_placements(parameter)
    if refusal is not None:
        raise ConfigError(f"a parameter of shape {tuple(parameter.shape)} is not usable: {refusal}")
    mesh = parameter.device_mesh
    place = next(i for i, placement in enumerate(parameter.placements) if placement.is_shard())
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    others = [i for i in range(mesh.ndim) if i != place]
    replica = 0
    for i in others:
        replica = replica * mesh.size(i) + coordinate[i]
    return Cut(
        parameter.shape[0], mesh.size(place), coordinate[place], mesh.get_group(place), replica
    )


def own_part(tensor: Tensor, rows: Span | None = None) -> Tensor:
    """A tensor itself, or what this rank holds of a sharded one; or of these rows of it, a view."""
    if not isinstance(tensor, DTensor):
        return tensor if rows is None else tensor[rows[0] : rows[1]]
    local = tensor.to_local()
    if rows is None:
        return local
    cut = parameter_cut(tensor)
    assert cut is not None
    first = cut.own[0]
    start, stop = overlap(cut.own, rows)
    return local[start - first : stop - first]


def row_numbers(parameter: Tensor) -> int:
    """How many numbers one row (index of dimension 0) has."""
    return math.prod(parameter.shape[1:])
