"""Kinds without two Kronecker sides: how layers become blocks of one side, and how large they are.

Letters: P numbers of a block, I input features (with the bias coordinate), O output features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import nn
from torch.distributed.tensor import DTensor

from distcurv.curvature.spec import SideSpec
from distcurv.curvature.triangle import triangle_size
from distcurv.errors import ConfigError
from distcurv.layers.column import ColumnIO, FullIO, Whole
from distcurv.layers.joint import ShowsSamples
from distcurv.layers.layer import LayerIO
from distcurv.train.discover import FoundLayer

FULL = "full"
# One layer of two sides as one side.
COLUMNS = ("layer_wise", "unit_rows", "diagonal")
# What is published of one block: a factor and its inverse, packed, float32.
MOST_BYTES = 1 << 29


def seen_as(found: FoundLayer, kind: str) -> FoundLayer:
    """The block as its kind sees it.  What has one side by nature stays as it is where the kind
    keeps no more of its curvature than that (``unit_rows``), or knows only two sides.

    Raises `ConfigError` where the kind needs whole gradients and the parameters are sharded."""
    layer = found.layer
    assert not isinstance(layer, Whole)
    if kind in ("lowrank", "dense"):
        return found
    if layer.one_sided is not None:
        more = {"unitwise": ("layer_wise", "diagonal"), "diagonal": ("layer_wise",)}
        if kind not in more[layer.one_sided] or not _shows_samples(found):
            return found
        _refuse_sharded(found, kind)
        joint = cast(ShowsSamples, layer)
        return found._replace(layer=FullIO([(found.module, joint, found.tied)], kind))
    _refuse_sharded(found, kind)
    if kind == FULL:
        # What joins no other layer has at least a matrix of its own.
        kind = "layer_wise"
    if kind in COLUMNS:
        return found._replace(layer=ColumnIO(layer, kind))
    return found


def joins(found: FoundLayer, kind: str) -> bool:
    """Whether the layer is a part of the block of kind ``full``: a module must show its samples."""
    return kind == FULL and _shows_samples(found)


def _shows_samples(found: FoundLayer) -> bool:
    layer = found.layer
    shows = layer.one_sided is None or isinstance(layer, ShowsSamples)
    return shows and found.source == "module"


def _refuse_sharded(found: FoundLayer, kind: str) -> None:
    assert not isinstance(found.layer, Whole)
    if isinstance(found.module.get_parameter(found.layer.weight), DTensor):
        raise ConfigError(
            f"block {found.name!r} is to be of kind {kind!r} and its parameters are sharded: that "
            "kind needs the whole gradient; use kind='lowrank'"
        )


def full_block(model: nn.Module, parts: Sequence[FoundLayer]) -> FoundLayer:
    """The block of several layers; raises `ConfigError` for sharded parameters."""
    layers = []
    for part in parts:
        _refuse_sharded(part, FULL)
        assert not isinstance(part.layer, Whole)
        layers.append((part.module, cast(LayerIO, part.layer), part.tied))
    return FoundLayer(FULL, model, FullIO(layers))


def side_of(found: FoundLayer, bias: bool) -> SideSpec:
    """The one side of such a block.

    Raises `ConfigError` where its matrices would take too many bytes."""
    layer = cast(Whole, found.layer)
    (dim,) = layer.dims(found.module, bias)
    if layer.one_sided == "diagonal":
        return SideSpec(dim, 0, "diagonal", "diagonal")
    units = layer.units(found.module, bias)
    nbytes = 2 * 4 * units * triangle_size(dim)
    if nbytes > MOST_BYTES:
        matrices = f"{units} Fisher matrices" if units > 1 else "a Fisher matrix"
        raise ConfigError(
            f"block {found.name!r} of kind {layer.one_sided!r} has {matrices} of dimension {dim}, "
            f"which with the inverse would take {nbytes} bytes packed; at most {MOST_BYTES} are "
            "allowed. Use kind='kfe', 'dense' or 'lowrank' for it (KfacConfig.overrides)"
        )
    return SideSpec(dim, dim, "none", "dense", units)
