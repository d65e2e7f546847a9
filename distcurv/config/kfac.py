"""`KfacConfig`: the settings of `distcurv.Preconditioner`, of all blocks and of single ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from distcurv.config.checks import is_count, is_positive, require
from distcurv.config.overrides import (
    LEAVE_OUT,
    BlockRule,
    Chooser,
    check_each_matches,
    checked_rules,
    settings_of,
)
from distcurv.config.schedule import Schedule, description, value_at
from distcurv.config.service import ServiceConfig
from distcurv.curvature.spec import MOST_PRODUCTS
from distcurv.errors import ConfigError


class BlockConfig(NamedTuple):
    """The settings of one block.

    ``config`` is without overrides.  ``own_damping``: a rule gives the block's damping, so it does
    not follow `Preconditioner.damping`."""

    config: KfacConfig
    own_damping: bool


KINDS = ("lowrank", "dense", "kfe", "layer_wise", "unit_rows", "full", "diagonal")
# Of these the damping is part of what is published, and a refresh is dear.
DAMPED_AT_REFRESH = ("dense", "layer_wise", "unit_rows", "full")


@dataclass(frozen=True, kw_only=True)
class KfacConfig(ServiceConfig):
    """Settings of `distcurv.Preconditioner`.

    Attributes:
        kind: of layers that are a matrix: ``lowrank``, ``dense`` (Cholesky inverse, the exact
            reference) or ``kfe`` (EKFAC) with two Kronecker sides; or without them, from
            per-sample gradients, for small layers: ``layer_wise`` (the whole Fisher matrix of a
            layer), ``unit_rows`` (one of each output), ``full`` (one of all layers together) or
            ``diagonal``.  What is a diagonal or unit-wise by nature stays so but where the kind
            says another matrix of per-sample gradients.
        damping: delta > 0, or a function of the step (not for the kinds ``dense``, ``layer_wise``,
            ``unit_rows`` and ``full``, whose damping is part of what is published).
        damping_form: ``absolute`` (pi-split of delta) or ``relative`` (a multiple kappa of each
            side's mean eigenvalue).
        tail_in, tail_out: tails of the input and output side: ``none | isotropic | diagonal``.
        max_itr: products with a factor of kind ``lowrank`` in one refresh, at most (block power
            iteration, from the basis before); they need the whole factor, so ``encoding`` is
            ``dense``.  None: a sketch is finished in a single one.
        tolerance: the products end where the basis moves by less; needs ``max_itr``.
        kl_clip: bound of the update's KL norm, None for no clipping.  Needs ``lr``.
        lr: learning rate that ``kl_clip`` uses unless ``step(lr=...)`` gives one: a number or a
            function of the step.
        graft: scale each block's direction to its gradient's norm.
        fisher_type: ``empirical | mc | exact``.
        loss_reduction: ``mean`` (over its terms) | ``sum``, as the user's loss does it.
        accumulation: micro-batches per step; the loss is divided by it.
        weight_sharing: ``expand`` | ``reduce``.
        ignore_modules: instances, classes or name substrings that are left alone.
        overrides: settings of single blocks: pairs of a regular expression (searched in the
            block's name) or a function ``(name, module) -> bool``, and a mapping of the fields
            that differ there; see `distcurv.config.overrides`.  Later pairs win.

    Functions of the step must be pure: all ranks call them, and a resumed run calls them again.
    """

    rank: int = 64
    kind: str = "lowrank"
    damping: float | Schedule = 1e-3
    damping_form: str = "absolute"
    tail_in: str = "isotropic"
    tail_out: str = "diagonal"
    max_itr: int | None = None
    tolerance: float = 0.0
    kl_clip: float | None = None
    lr: float | Schedule | None = None
    graft: bool = False
    fisher_type: str = "empirical"
    loss_reduction: str = "mean"
    accumulation: int = 1
    weight_sharing: str = "expand"
    ignore_modules: tuple[object, ...] = ()
    overrides: Sequence[tuple[Chooser, Mapping[str, object]]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {
            "kind": KINDS,
            "damping_form": ("absolute", "relative"),
            "tail_in": ("none", "isotropic", "diagonal"),
            "tail_out": ("none", "isotropic", "diagonal"),
            "fisher_type": ("empirical", "mc", "exact"),
            "loss_reduction": ("mean", "sum"),
            "weight_sharing": ("expand", "reduce"),
        }
        for field, allowed in choices.items():
            require(
                getattr(self, field) in allowed, self, field, f"use one of {', '.join(allowed)}"
            )
        require(
            self.kind not in DAMPED_AT_REFRESH or not callable(self.damping),
            self,
            "damping",
            f"that of kind {self.kind!r} is fixed when a preconditioner is made: give a number",
        )
        self.damping_at(0)
        self.lr_at(0)
        require(
            self.kl_clip is None or is_positive(self.kl_clip),
            self,
            "kl_clip",
            "give None or a number > 0",
        )
        require(
            self.max_itr is None or (is_count(self.max_itr) and self.max_itr <= MOST_PRODUCTS),
            self,
            "max_itr",
            f"give None or an integer from 1 to {MOST_PRODUCTS}",
        )
        require(
            self.max_itr in (None, 1) or self.encoding != "sketch",
            self,
            "max_itr",
            "a sketch is one product: leave it out, or encoding='sketch'",
        )
        require(
            self.tolerance == 0 or is_positive(self.tolerance),
            self,
            "tolerance",
            "give 0 or a number > 0",
        )
        require(
            self.tolerance == 0 or self.max_itr is not None,
            self,
            "tolerance",
            "it ends the products that max_itr allows: give both",
        )
        require(isinstance(self.graft, bool), self, "graft", "give True or False")
        require(
            not (self.graft and self.kl_clip is not None),
            self,
            "graft",
            "kl_clip and graft exclude each other: choose one",
        )
        require(is_count(self.accumulation), self, "accumulation", "give an integer >= 1")
        self._check_overrides()

    def _check_overrides(self) -> None:
        rules = checked_rules(self.overrides, [field.name for field in fields(self)])
        object.__setattr__(self, "overrides", rules)
        for index, rule in enumerate(rules):
            try:
                self._with({k: v for k, v in rule.settings.items() if k != LEAVE_OUT})
            except ConfigError as error:
                where = f"KfacConfig.overrides[{index}] ({description(rule.chooser)})"
                raise ConfigError(f"{where}: {error}") from error

    def _with(self, settings: Mapping[str, object]) -> KfacConfig:
        """This config for one block, with other values of some fields."""
        return replace(self, overrides=(), **settings)  # type: ignore[arg-type]

    # -- what changes with the step ---------------------------------------------------------

    def damping_at(self, step: int) -> float:
        """The damping at a step; raises `ConfigError` where a function gives none that works."""
        name = f"{type(self).__name__}.damping"
        return float(value_at(self.damping, step, name, is_positive, "give a number > 0"))

    def lr_at(self, step: int) -> float | None:
        """The learning rate for ``kl_clip`` at a step; raises as `damping_at`."""
        if self.lr is None:
            return None
        name = f"{type(self).__name__}.lr"
        return float(value_at(self.lr, step, name, is_positive, "give None or a number > 0"))

    # -- single blocks ----------------------------------------------------------------------

    def of_blocks(self, modules: Sequence[tuple[str, object]]) -> list[BlockConfig | None]:
        """The settings of each block; None for one that is left to the base optimizer.

        Args:
            modules: name and module of each block.

        Raises `ConfigError` where a regular expression matches no block, or where the rules
        together give a block settings that cannot work."""
        rules = [BlockRule(chooser, dict(settings)) for chooser, settings in self.overrides]
        check_each_matches(rules, [name for name, _ in modules])
        configs: list[BlockConfig | None] = []
        for name, module in modules:
            settings = settings_of(rules, name, module)
            if not settings.pop(LEAVE_OUT, True):
                configs.append(None)
                continue
            try:
                config = self._with(settings)
            except ConfigError as error:
                raise ConfigError(f"block {name}, by KfacConfig.overrides: {error}") from error
            configs.append(BlockConfig(config, "damping" in settings))
        return configs

    # -- what None and auto stand for -------------------------------------------------------

    @property
    def resolved_early_steps(self) -> int:
        """The length of the early phase in steps; refreshes of matrices are too dear for it."""
        if self.early_steps is None and self.kind in (*DAMPED_AT_REFRESH, "kfe"):
            return 0
        return super().resolved_early_steps

    @property
    def resolved_max_rows(self) -> int | None:
        """The most rows of a call that are read; None for all, as the exact kinds need."""
        if self.max_rows == "auto" and self.kind != "lowrank":
            return None
        return super().resolved_max_rows
