"""The blocks of `ShampooGradientMaker`: what a tile is to the service, and a version's roots."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distcurv.curvature.damping import split_damping
from distcurv.curvature.estimate import Estimate
from distcurv.curvature.inverse import Inverse, LowRankInverse
from distcurv.curvature.kinds import KINDS
from distcurv.curvature.kinds.lowrank import side_estimate
from distcurv.curvature.modes import side_dims
from distcurv.curvature.roots import root_low_rank
from distcurv.curvature.spec import MOST_SIDES, BlockSpec, SideSpec
from distcurv.curvature.statistics import resolve_encoding
from distcurv.errors import ConfigError
from distcurv.makers.preconditioning_config import PreconditioningConfig
from distcurv.makers.tiles import Tile
from distcurv.train.switch import Install
from distcurv.wire.checks import Limits

FLOAT_BYTES = 4


def power_of(order: int, exponent: float | None) -> float:
    """p of the roots (factor + damping · I)⁻ᵖ of a tensor of so many dimensions."""
    return 1.0 / (2 * order) if exponent is None else -exponent


def tile_spec(
    tile: Tile, config: PreconditioningConfig, decay: float, exponent: float | None
) -> BlockSpec:
    """The block of a tile: kind ``shampoo``, or ``lowrank`` where the config has a rank.

    Args:
        decay: of the statistics; 1: their sum counts.

    Raises `ConfigError` for a tile whose preconditioner would not fit into a message."""
    spec = _spec(tile, config, decay, exponent)
    size = FLOAT_BYTES * KINDS[spec.kind].published_layout(spec).size
    most = Limits().payload_bytes
    if size > most:
        raise ConfigError(
            f"ShampooGradientMaker: {tile.name} has shape {tile.shape}, and its roots would take "
            f"{size} bytes, at most {most} can be: give block_size (e.g. 4096), "
            "PreconditioningConfig.rank, or ignore_modules"
        )
    return spec


def _spec(
    tile: Tile, config: PreconditioningConfig, decay: float, exponent: float | None
) -> BlockSpec:
    dims = side_dims(tile.shape)
    if len(dims) > MOST_SIDES:
        raise ConfigError(
            f"ShampooGradientMaker: {tile.name} has {len(dims)} dimensions, at most {MOST_SIDES} "
            "can be: use matricise=True or ignore_modules"
        )
    if config.rank is not None:
        sides = []
        for dim in dims:
            rank = min(config.rank, dim)
            encoding = resolve_encoding(dim, rank, "isotropic", config.encoding)
            sides.append(SideSpec(dim, rank, "isotropic", encoding))
        return BlockSpec(tile.name, "lowrank", tuple(sides), decay, wire_dtype=config.wire_dtype)
    return BlockSpec(
        tile.name,
        "shampoo",
        tuple(SideSpec(dim, dim, "none", "dense") for dim in dims),
        decay,
        config.damping,
        config.damping_form == "relative",
        power_of(len(dims), exponent),
    )


class Roots:
    """The roots of the installed versions, made once for each version.

    Args:
        specs: by block.
        config: its damping, for blocks of low rank.
        exponent: see `power_of`.
    """

    def __init__(
        self, specs: Sequence[BlockSpec], config: PreconditioningConfig, exponent: float | None
    ) -> None:
        self._specs = specs
        self._config = config
        self._exponent = exponent
        self._kept: dict[int, tuple[Install, tuple[Inverse, ...]]] = {}

    def of(self, install: Install) -> tuple[Inverse, ...]:
        """One matrix for each side, float32."""
        kept = self._kept.get(install.block)
        if kept is None or kept[0] is not install:
            kept = self._kept[install.block] = (install, self._make(install))
        return kept[1]

    def _make(self, install: Install) -> tuple[Inverse, ...]:
        spec, tensors = self._specs[install.block], install.tensors
        relative = self._config.damping_form == "relative"
        if spec.kind == "shampoo":
            roots = KINDS[spec.kind].inverses(spec, tensors, spec.damping, relative)
            return tuple(root for root in roots if isinstance(root, Inverse))
        made = []
        for name, side in spec.named_sides():
            estimate = side_estimate(side, name, tensors).double()
            if spec.decay == 1.0:
                estimate = _times(estimate, tensors[f"{name}.weight"])
            (damping,) = split_damping(self._config.damping, [estimate.trace], [side.dim], relative)
            root = root_low_rank(estimate, damping, power_of(len(spec.sides), self._exponent))
            made.append(LowRankInverse(root.inv_diag.float(), root.W_dr.float()))
        return tuple(made)


def _times(estimate: Estimate, number: Tensor) -> Estimate:
    """From the mean of so many statistics to their sum."""
    U_dr, lam_r, tail, trace = estimate
    number = number.double()
    return Estimate(U_dr, lam_r * number, None if tail is None else tail * number, trace * number)
