"""The blocks of K-FAC: which there are, with which settings, and what is left out.

A pure function of model and config, so that `Preconditioner` and ``distcurv inspect`` agree on the
blocks, and that the latter needs neither ranks nor workers nor memory for the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from distcurv.config import KfacConfig
from distcurv.config.kfac import BlockConfig
from distcurv.curvature.spec import SIDE_NAMES, BlockSpec, SideSpec
from distcurv.curvature.statistics import resolve_encoding
from distcurv.errors import ConfigError
from distcurv.layers.column import Whole, layers_of
from distcurv.layers.shards import refuse_shards
from distcurv.train.block_shapes import full_block, joins, seen_as, side_of
from distcurv.train.discover import FoundLayer, Uncovered, bare_model, find_layer_blocks


class PlannedBlock(NamedTuple):
    """A block with its settings.

    Attributes:
        found: its layer.
        bias: whether the bias belongs to it.
        config: the settings that hold for it, without overrides.
        own_damping: its damping is its own and does not follow `Preconditioner.damping`.
        spec: the block, as ranks and workers know it.
    """

    found: FoundLayer
    bias: bool
    config: KfacConfig
    own_damping: bool
    spec: BlockSpec


def plan_blocks(model: nn.Module, config: KfacConfig) -> tuple[list[PlannedBlock], list[Uncovered]]:
    """The blocks of a model in its order, and what is left to the base optimizer.

    Args:
        model: bare or wrapped in DistributedDataParallel; parameters may be on ``meta``.

    Raises `ConfigError` when nothing can be preconditioned, or for overrides that fit no block or
    cannot work."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}: give the torch.nn.Module itself")
    every, uncovered = find_layer_blocks(model, config.ignore_modules)  # type: ignore[arg-type]
    found = []
    for layer in every:
        assert not isinstance(layer.layer, Whole)
        refusal = refuse_shards(layer.module, layer.layer, layer.source == "gradient")
        if refusal is None:
            found.append(layer)
        else:
            uncovered.append(Uncovered(layer.name, refusal))
    configs = config.of_blocks([(layer.name, layer.module) for layer in found]) if found else []
    blocks = []
    joined: list[tuple[FoundLayer, BlockConfig]] = []
    for layer, own in zip(found, configs, strict=True):
        if own is None:
            uncovered.append(Uncovered(layer.name, "left out by KfacConfig.overrides"))
        elif joins(layer, own.config.kind):
            joined.append((layer, own))
        else:
            blocks.append(_planned(seen_as(layer, own.config.kind), own))
    if joined:
        blocks.insert(0, _full(model, joined))
    if not blocks:
        why = ": none of its parameters is trained"
        if uncovered:
            why = f"; left out: {reasons(uncovered)}"
        raise ConfigError(f"the model has no layer that can be preconditioned{why}")
    return blocks, uncovered


def _planned(found: FoundLayer, own: BlockConfig) -> PlannedBlock:
    bias = found.layer.trains_bias(found.module)
    spec = block_spec(found, bias, own.config)
    return PlannedBlock(found, bias, own.config, own.own_damping, spec)


def _full(model: nn.Module, joined: Sequence[tuple[FoundLayer, BlockConfig]]) -> PlannedBlock:
    """The block that several layers make together."""
    first, own = joined[0]
    odd = [found.name for found, other in joined if other != own]
    if odd:
        raise ConfigError(
            f"{', '.join(odd)} and {first.name} are in one block of kind 'full', but "
            "KfacConfig.overrides give them different settings: give all of them the same"
        )
    return _planned(full_block(bare_model(model), [found for found, _ in joined]), own)


def owned_parameters(blocks: Sequence[PlannedBlock]) -> list[tuple[nn.Module, str]]:
    """Module and name in it of each parameter of the blocks."""
    return [
        (module, name)
        for block in blocks
        for module, layer in layers_of(block.found.module, block.found.layer)
        for name in layer.parameter_names(module)
    ]


def device_of(blocks: Sequence[PlannedBlock]) -> torch.device:
    """The one device of the blocks' parameters; raises `ConfigError` where there are several."""
    modules = [module for module, _ in owned_parameters(blocks)]
    devices = {p.device for module in modules for p in module.parameters(recurse=False)}
    if len(devices) != 1:
        raise ConfigError(
            f"the covered layers are on {sorted(map(str, devices))}: put them on one device"
        )
    device = devices.pop()
    if device.type == "meta":
        raise ConfigError(
            "the covered layers are on the device meta: give them memory first (to_empty)"
        )
    return device


def reasons(uncovered: Sequence[Uncovered]) -> str:
    """What is left out and why, in one line."""
    return "; ".join(f"{one.name} ({one.reason})" for one in uncovered)


def block_spec(found: FoundLayer, bias: bool, config: KfacConfig) -> BlockSpec:
    """A block as ranks and workers know it.

    What is a diagonal or unit-wise by nature, and comes here as it is, stays so, whatever kind the
    config asks for."""
    layer = found.layer
    dims = layer.dims(found.module, bias)
    kind = config.kind
    if isinstance(layer, Whole):
        kind, sides = layer.one_sided, [side_of(found, bias)]
    elif layer.one_sided is not None:
        kind = layer.one_sided
        encoding = "unit" if kind == "unitwise" else "diagonal"
        sides = [SideSpec(dims[0], 0, "diagonal", encoding)]
    else:
        tails = (config.tail_in, config.tail_out)
        sides = [
            SideSpec(dim, 0, "diagonal", "diagonal")
            if name in layer.diagonal_sides
            else _side(dim, tail, config)
            for name, dim, tail in zip(SIDE_NAMES, dims, tails, strict=True)
        ]
        if kind == "kfe" and layer.diagonal_sides:
            kind = "dense"  # the eigenbasis of a diagonal is no better than it
    return BlockSpec(
        found.name,
        kind,
        tuple(sides),
        config.factor_decay,
        config.damping_at(0),
        config.damping_form == "relative",
        max_itr=(config.max_itr or 0) if kind == "lowrank" else 0,
        tolerance=config.tolerance if kind == "lowrank" else 0.0,
        wire_dtype=config.wire_dtype if kind == "lowrank" else "float32",
    )


def _side(dim: int, tail: str, config: KfacConfig) -> SideSpec:
    if config.kind in ("dense", "kfe"):
        return SideSpec(dim, dim, "none", "dense")
    rank = min(config.rank, dim)
    whole = config.encoding == "auto" and config.max_itr is not None
    encoding = "dense" if whole else resolve_encoding(dim, rank, tail, config.encoding)
    return SideSpec(dim, rank, tail, encoding)
