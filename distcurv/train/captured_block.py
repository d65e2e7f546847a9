"""A block as capture sees it: where its parameters are used, and how each use is read.

It knows nothing of hooks, steps or sinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

from torch import nn

from distcurv.curvature.sample_gradients import EIGENBASIS
from distcurv.curvature.spec import BlockSpec, SideSpec, Tensors
from distcurv.errors import CaptureError, ShapeError
from distcurv.layers.bare import AnyLayer
from distcurv.layers.column import ColumnIO, FullIO, FullPart, Whole
from distcurv.layers.joint import JointIO, ShowsSamples
from distcurv.layers.layer import WeightSharing
from distcurv.train.sample_uses import LayerSampleUse, TokenSampleUse, UnitSampleUse
from distcurv.train.uses import EmbeddingUse, JointUse, SidesUse, Use


class Watched(NamedTuple):
    """What `Capture` is told of a block.

    Attributes:
        module: owns the parameters.
        layer: how they are seen; a `FullIO` knows its modules itself.
        spec: the block.
        calls: captured where functions use the parameters, not where the module runs.
        tied: further modules with the same weight: of the same type, or embeddings of a Linear's.
    """

    module: nn.Module
    layer: AnyLayer | Whole
    spec: BlockSpec
    calls: bool = False
    tied: tuple[nn.Module, ...] = ()


class CapturedBlock:
    """Which modules, how to read them, and how the block's sides are encoded.

    Raises `ShapeError` when the BlockSpec does not have the dimensions of the module, with or
    without the bias coordinate; which of the two says whether the bias belongs to the block.
    """

    def __init__(self, name: str, watched: Watched, weight_sharing: WeightSharing) -> None:
        module, layer, spec, calls, tied = watched
        self.name = name
        self.module = module
        self.layer = layer
        self.calls = calls
        self.spec = spec
        self.sides: dict[str, SideSpec] = dict(spec.named_sides())
        self.weight_sharing = weight_sharing
        dims = tuple(side.dim for side in spec.sides)
        choices = {layer.dims(module, bias): bias for bias in (False, layer.trains_bias(module))}
        if dims not in choices:
            raise ShapeError(
                f"block {name!r} has sides of dimensions {dims}, but its "
                f"{type(module).__name__} has {' or '.join(map(str, choices))}"
            )
        # Of a one-sided block the bias changes no dimension, so both choices may be there.
        self.bias = choices[dims]
        self.tied = tied

    def module_uses(self) -> Sequence[tuple[nn.Module, Use]]:
        """The modules whose forwards use the block."""
        if self.calls:
            return []
        if isinstance(self.layer, FullIO):
            return [pair for part in self.layer.parts for pair in part_uses(part)]
        uses: list[tuple[nn.Module, Use]] = [(self.module, self.use(self.module))]
        for module in self.tied:
            if isinstance(module, nn.Embedding) and not isinstance(self.module, nn.Embedding):
                uses.append((module, self.embedding_use(module.padding_idx)))
            else:
                uses.append((module, self.use(module)))
        return uses

    def use(self, how: object, columns: tuple[int, int] | None = None) -> Use:
        """The use by a module, or by a function call with a stand-in for one."""
        if isinstance(self.layer, ColumnIO):
            inner = self.layer.inner
            return LayerSampleUse(inner, how, self.bias, inner.dims(self.module, False), columns)
        if self.layer.one_sided is not None:
            return JointUse(cast(JointIO, self.layer), how, self.bias)
        layer = self.layer
        sides = SidesUse(layer, how, self.sides, self.bias, self.weight_sharing, columns)
        if self.spec.kind != EIGENBASIS:
            return sides
        dims = layer.dims(self.module, False)
        return LayerSampleUse(layer, how, self.bias, dims, columns, sides=sides)

    def embedding_use(self, padding_idx: int | None) -> Use:
        """The use of a block of Linear layout as an embedding."""
        if isinstance(self.layer, ColumnIO):
            ids = self.layer.inner.dims(self.module, False)[1]
            return TokenSampleUse(ids, padding_idx)
        sides = EmbeddingUse(self.sides, padding_idx, self.weight_sharing)
        if self.spec.kind != EIGENBASIS:
            return sides
        return TokenSampleUse(self.sides["G"].dim, padding_idx, sides=sides)

    def check_bases(self, bases: Tensors) -> None:
        """Raises `CaptureError` where a sketch has no basis, or one of another shape."""
        for prefix, side in self.sides.items():
            if side.encoding != "sketch" and self.spec.kind != EIGENBASIS:
                continue
            basis = bases.get(f"{prefix}.U")
            shape = None if basis is None else tuple(basis.shape)
            if shape != (side.dim, side.rank):
                raise CaptureError(
                    f"block {self.name!r} needs the basis {prefix}.U of shape "
                    f"({side.dim}, {side.rank}) to take a sketch; got {shape}"
                )


def part_uses(part: FullPart) -> list[tuple[nn.Module, Use]]:
    """The modules whose forwards use a part of a block of several layers."""
    module, layer, bias, tied, start, _ = part
    uses: list[tuple[nn.Module, Use]] = []
    for one in (module, *tied):
        if layer.one_sided is not None:
            uses.append((one, UnitSampleUse(cast(ShowsSamples, layer), one, bias, start)))
            continue
        dims = layer.dims(module, False)
        if isinstance(one, nn.Embedding) and not isinstance(module, nn.Embedding):
            uses.append((one, TokenSampleUse(dims[1], one.padding_idx, start)))
        else:
            uses.append((one, LayerSampleUse(layer, one, bias, dims, start=start)))
    return uses
