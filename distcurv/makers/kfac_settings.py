"""From `PreconditioningConfig` to `KfacConfig`, for the makers over `distcurv.Preconditioner`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distcurv.config import KfacConfig
from distcurv.makers.preconditioning_config import PreconditioningConfig
from distcurv.makers.schedule import UpdateTimes
from distcurv.makers.service_settings import UntilUpdate, service_settings
from distcurv.makers.shapes import SHAPES, Assigned, Assignment
from distcurv.train.discover import FoundLayer

Override = tuple[object, Mapping[str, object]]


@dataclass(frozen=True)
class Newest:
    """Whether a step's statistic is the newest at the update that comes next: without an average
    the others would be thrown away."""

    statistics: UpdateTimes
    updates: UpdateTimes

    def __call__(self, step: int) -> bool:
        if not self.statistics.due(step) or self.updates.due(step):
            return self.statistics.due(step)
        update = step + UntilUpdate(self.updates)(step)
        return step + UntilUpdate(self.statistics)(step) > update


@dataclass(frozen=True)
class InStep:
    """Chooses the blocks of these names, for `KfacConfig.overrides`."""

    names: frozenset[str]

    def __call__(self, name: str, module: object) -> bool:
        return name in self.names


def in_step_blocks(assignment: Assignment, found: Sequence[FoundLayer]) -> list[FoundLayer]:
    """The blocks that the ranks precondition by themselves; not those with a diagonal side
    (embeddings), where nothing is inverted, nor those whose rows come from several modules or from
    functions: these are served, as dense factors, which is the same matrix."""
    chosen = []
    for block in found:
        shape = assignment.of(block.name, block.module)
        matrices = block.layer.one_sided is None and not block.layer.diagonal_sides
        rows = block.source == "module" and not block.tied
        if shape is not None and SHAPES[shape].in_step and matrices and rows:
            chosen.append(block)
    return chosen


def kfac_config(
    config: PreconditioningConfig,
    assignment: Assignment,
    in_step: Sequence[FoundLayer],
    *,
    fisher_type: str,
    scale: float,
) -> KfacConfig:
    """The settings of the `Preconditioner` under a maker.

    Args:
        in_step: blocks that it leaves alone.
        fisher_type: ``empirical | mc | exact``.
        scale: s of (s F + damping)^-1 g, which is (F + damping / s)^-1 g / s: here the damping.

    Raises `ConfigError` for settings that cannot work together."""
    shapes = {name: SHAPES[name].settings(config) for name in assignment.names}
    overrides: list[Override] = [
        (Assigned(assignment, name), settings) for name, settings in shapes.items()
    ]
    overrides.append((Assigned(assignment, None), {"precondition": False}))
    overrides += [
        (chooser, _scaled(settings, config.damping_form, scale))
        for chooser, settings in config.overrides
    ]
    overrides.append((InStep(frozenset(b.name for b in in_step)), {"precondition": False}))
    settings = service_settings(config, None)
    if config.ema_decay is None:
        settings["statistics_at"] = Newest(config.curvature_times(), config.preconditioner_times())
    relative = config.damping_form == "relative"
    return KfacConfig(
        **settings,
        kind="dense" if config.rank is None else "lowrank",
        rank=1 if config.rank is None else config.rank,
        factor_decay=0.0 if config.ema_decay is None else 1.0 - config.ema_decay,
        damping=config.damping if relative else config.damping / scale,
        damping_form=config.damping_form,
        tail_in=config.tail_in,
        tail_out=config.tail_out,
        max_itr=config.max_itr,
        tolerance=config.tolerance,
        kl_clip=config.kl_clip,
        lr=config.lr,
        graft=config.graft,
        fisher_type=fisher_type,
        accumulation=config.accumulation,
        weight_sharing=config.weight_sharing,
        max_rows=config.max_rows,
        ignore_modules=tuple(config.ignore_modules or ()),
        overrides=overrides,  # type: ignore[arg-type]
    )


def _scaled(settings: Mapping[str, object], form: str, scale: float) -> Mapping[str, object]:
    """A block's own settings with its damping for F instead of scale F."""
    damping = settings.get("damping")
    if settings.get("damping_form", form) == "relative" or not isinstance(damping, int | float):
        return settings
    return {**settings, "damping": damping / scale}
